"""Elements of the largest feature map, against the networks themselves on tensors without data."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_engine.planner import ELEMENT_LIMIT, decoder_elements, most_rows, unet_elements
from tests.sd15_sizes import SD15, SD15_VAE, TINY
from tests.synthesis import small_sd
from tests.tiny_sd import TINY_VAE, UNET, VAE

LAYERS = (
    "aten::convolution",
    "aten::addmm",
    "aten::mm",
)  # bmm would be attention's scores, which fused kernels never hold


class Largest(TorchDispatchMode):
    """Elements of the largest map that a convolution or a linear layer reads or writes; its weights are none."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in LAYERS:
            read = args[1] if func._schema.name == "aten::addmm" else args[0]
            self.elements = max(self.elements, read.numel(), out.numel())
        return out


def largest(make: Callable[[], torch.nn.Module], call: Callable[[torch.nn.Module], Tensor]) -> int:
    with torch.device("meta"):
        network = make()
        with torch.no_grad(), Largest() as seen:
            call(network)
    return seen.elements


def of_unet(config, size) -> int:
    width = config["cross_attention_dim"]

    def call(network):
        z = torch.empty(1, config["in_channels"], *size)
        return network(z, torch.zeros(1), encoder_hidden_states=torch.empty(1, 77, width)).sample

    return largest(lambda: UNet2DConditionModel(**config), call)


def of_decoder(kind, config, size) -> int:
    return largest(
        lambda: kind(**config), lambda vae: vae.decode(torch.empty(1, config["latent_channels"], *size)).sample
    )


def test_stable_diffusion_at_512() -> None:
    assert unet_elements(SD15, (64, 64)) == 8 * 320 * 64 * 64 == of_unet(SD15, (64, 64))
    assert decoder_elements(SD15_VAE, (64, 64)) == 256 * 512 * 512 == of_decoder(AutoencoderKL, SD15_VAE, (64, 64))
    assert most_rows(unet_elements(SD15, (64, 64))) == 204 and most_rows(decoder_elements(SD15_VAE, (64, 64))) == 31
    assert most_rows(decoder_elements(TINY, (64, 64))) == 127
    assert most_rows(decoder_elements(SD15_VAE, (1024, 1024))) == 0  # not even one


@pytest.mark.parametrize("elements, rows", [(1, ELEMENT_LIMIT), (ELEMENT_LIMIT, 1), (ELEMENT_LIMIT + 1, 0), (2**30, 1)])
def test_most_rows_is_the_last_that_fits(elements: int, rows: int) -> None:
    assert most_rows(elements) == rows
    assert rows * elements <= ELEMENT_LIMIT < (rows + 1) * elements


GROUPS = {"norm_num_groups": 8}  # a norm refuses groups of one value, such as 32 of 32 channels in a single cell
UNETS = {
    "the test's": {**UNET, **small_sd.UNET},
    "no attention": UNET | {"down_block_types": ("DownBlock2D",) * 4, "mid_block_type": None}
    | {"up_block_types": ("UpBlock2D",) * 4},
    "wide below": UNET | {"block_out_channels": (32, 64, 256, 512)},
    "wide above": UNET | {"block_out_channels": (256, 32, 32, 32)},
    "padded by hand": UNET | {"downsample_padding": 0},
    "many latent channels": UNET | {"in_channels": 700, "out_channels": 700},
    "one level": UNET | {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",)}
    | {"up_block_types": ("UpBlock2D",)},
}  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64), (8, 16), (7, 9), (1, 1)])
@pytest.mark.parametrize("name", UNETS)
def test_of_a_unet(name: str, size: tuple[int, int]) -> None:
    config = UNETS[name]
    if name == "padded by hand" and size not in ((64, 64), (8, 16)):
        pytest.skip("it rounds odd sizes down, and its own way up does not find back")
    config = config | GROUPS if size == (1, 1) and name != "the test's" else config
    seen, said = of_unet(config, size), unet_elements(config, size)
    assert seen <= said and (seen == said or name == "padded by hand" or size == (1, 1))  # text alone counts there


VAES = {
    "Stable Diffusion, thinned": (AutoencoderKL, VAE),
    "the test's": (AutoencoderKL, {**VAE, **small_sd.VAE}),
    "one level": (AutoencoderKL, VAE | {"block_out_channels": (8,), "up_block_types": ("UpDecoderBlock2D",)}
                  | {"down_block_types": ("DownEncoderBlock2D",)}),
    "wide above": (AutoencoderKL, VAE | {"block_out_channels": (64, 8, 8, 8)}),
    "wide latents": (AutoencoderKL, VAE | {"block_out_channels": (8,) * 4, "latent_channels": 2000}),
    "tiny": (AutoencoderTiny, TINY_VAE | {"latent_channels": 4}),
    "tiny, times three": (AutoencoderTiny, TINY_VAE | {"upsampling_scaling_factor": 3, "latent_channels": 4}),
}  # fmt: skip


@pytest.mark.parametrize("size", [(64, 64), (8, 16), (7, 9)])
@pytest.mark.parametrize("name", VAES)
def test_of_a_decoder(name: str, size: tuple[int, int]) -> None:
    kind, config = VAES[name]
    assert of_decoder(kind, config, size) == decoder_elements(config, size)


@settings(max_examples=20, deadline=None)  # a case takes tenths of a second
@given(st.data())
def test_of_any_unet(data: st.DataObject) -> None:
    """Never below what the network makes; widths, blocks and sizes as they come."""
    levels = data.draw(st.integers(1, 4), "levels")
    widths = data.draw(st.lists(st.sampled_from([32, 64, 96, 320]), min_size=levels, max_size=levels), "widths")
    crossed = data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels), "attention")
    config = (
        UNET
        | GROUPS
        | {
            "block_out_channels": tuple(widths),
            "down_block_types": tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed),
            "up_block_types": tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)),
            "layers_per_block": data.draw(st.integers(1, 3), "layers"),
            "mid_block_type": data.draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]), "middle"),
        }
    )
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)), "latents")
    assert of_unet(config, size) <= unet_elements(config, size)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([16, 32, 64, 512]), min_size=1, max_size=4),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.booleans(),
)
def test_of_any_decoder(widths: list[int], size: tuple[int, int], tiny: bool) -> None:
    if tiny:  # its blocks have one width
        widths = [widths[0]] * len(widths)
        counts = {"num_encoder_blocks": (1,) * len(widths), "num_decoder_blocks": (1,) * len(widths)}
        config = {"encoder_block_out_channels": tuple(widths), "decoder_block_out_channels": tuple(widths), **counts}
        config["latent_channels"] = 4
        seen = of_decoder(AutoencoderTiny, config, size)
    else:
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(widths)}
        config = VAE | {"block_out_channels": tuple(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
        seen = of_decoder(AutoencoderKL, config | kinds, size)
    assert seen == decoder_elements(config, size)
