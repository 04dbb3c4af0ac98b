"""Bytes counted, against functions whose bytes are known and an allocator; elements, against the networks themselves."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_engine.memory import (
    ELEMENT_LIMIT,
    CallPlan,
    Footprint,
    decoder_elements,
    footprint,
    halved,
    most_rows,
    plan_calls,
    shared,
    unet_elements,
    weight_bytes,
)
from tests.engine import small_graphs
from tests.sd15_sizes import SD15, SD15_VAE, TINY
from tests.tiny_sd import TINY_VAE, UNET, VAE

KIB = 1024


def relu_chain(rows: int) -> Tensor:
    """Two tensors of 1 KiB a row live at once, however long the chain."""
    x = torch.zeros(rows, 256)
    for _ in range(5):
        x = torch.relu(x)
    return x


def saved_chain(rows: int) -> Tensor:
    """Autograd keeps every one of five results of 1 KiB a row; the backward pass holds two gradients more."""
    leaf = torch.zeros(rows, 256, requires_grad=True)
    x = leaf
    for _ in range(5):
        x = torch.sigmoid(x)
    (gradient,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
    return gradient


def with_a_constant(rows: int) -> Tensor:
    table = torch.zeros(1024)
    return torch.zeros(rows, 256) + table[:256]


@pytest.mark.parametrize("without_data", [True, False])
@pytest.mark.parametrize(
    "call, fixed, row", [(relu_chain, 0, 2 * KIB), (saved_chain, 0, 9 * KIB), (with_a_constant, 4 * KIB, 2 * KIB)]
)
def test_bytes_that_are_known(call: Callable[[int], Tensor], fixed: int, row: int, without_data: bool) -> None:
    found = footprint(call, without_data)
    assert (found.fixed, found.row, found.flop) == (fixed, row, 0)
    assert found.elements == (512 if call is with_a_constant else 256)  # the table is larger than two rows


def test_flop_of_a_row_with_the_fused_attention_of_a_cpu() -> None:
    assert footprint(lambda rows: torch.ones(rows, 8) @ torch.ones(8, 4), True).flop == 2 * 8 * 4

    def attention(rows: int) -> Tensor:
        q = torch.ones(rows, 2, 64, 16)
        return F.scaled_dot_product_attention(q, q, q)

    assert footprint(attention, True).flop == 2 * 2 * 2 * 64 * 64 * 16


@pytest.mark.parametrize("without_data", [True, False])
def test_weights_and_their_views_are_not_a_call(without_data: bool) -> None:
    layer = nn.Linear(300, 7)  # its weight is transposed in the call, a view of more elements than a row has
    with torch.no_grad():
        found = footprint(lambda rows: layer(torch.zeros(rows, 300)), without_data)
    assert (found.fixed, found.row, found.elements) == (0, 4 * 307, 300)
    assert weight_bytes(layer, layer, nn.BatchNorm2d(3)) == 4 * 2107 + 4 * 4 * 3 + 8


def test_a_function_that_asks_for_values_is_run_as_it_is_and_one_that_fails_says_so() -> None:
    def asks(rows: int) -> Tensor | None:
        x = torch.zeros(rows, 256)
        return x + 1 if float(x.sum()) == 0 else None

    assert footprint(asks, without_data=True).elements == 256

    def fails(rows: int) -> None:
        raise LookupError("of its own")

    with pytest.raises(LookupError, match="of its own"):
        footprint(fails, without_data=True)


def peak_of_the_allocator(call: Callable[[int], object], rows: int) -> int:
    """Most bytes that torch's CPU allocator had given out during a call, over those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call(rows)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("network", ["unet", "gradient"])
def test_against_the_allocator_of_the_cpu(network: str) -> None:
    """At least what was counted from one row and two, and little more: the scratch memory of single kernels."""
    function = small_graphs.networks().function(network)

    @torch.no_grad()
    def call(rows: int) -> object:
        return function(*small_graphs.arguments(network, rows))

    call(1)
    found = footprint(call, without_data=False)
    assert footprint(call, without_data=True) == found
    counted, real = found.bytes(256), peak_of_the_allocator(call, 256)
    assert 0.99 * counted <= real <= 1.25 * counted


# --- rows of a call -------------------------------------------------------------------------------------------------
def test_calls_are_as_few_as_the_limits_allow_and_of_about_equal_size() -> None:
    needs = Footprint(100, 10, 1)
    assert plan_calls(64, needs, {"memory": 200, "elements": 64}) == CallPlan(64, 1, 740, "")
    assert plan_calls(64, needs, {"memory": 30, "--batch": 30}) == CallPlan(22, 3, 320, "memory")
    assert plan_calls(64, needs, {"memory": 0}) == CallPlan(1, 64, 110, "memory")
    assert plan_calls(5, needs, {}) == CallPlan(5, 1, 150, "")
    assert [shared(10, most) for most in (10, 9, 4, 3, 1, 0)] == [10, 5, 4, 3, 1, 1]
    assert [halved(rows) for rows in (64, 3, 2)] == [32, 1, 1]
    assert needs.most_rows(155) == 5 and needs.most_rows(10) == 0
    assert needs.with_(Footprint(1, 20, 5, 7)) == Footprint(100, 20, 5, 7)


@pytest.mark.parametrize("elements, rows", [(1, ELEMENT_LIMIT), (ELEMENT_LIMIT, 1), (ELEMENT_LIMIT + 1, 0), (2**30, 1)])
def test_most_rows_is_the_last_that_fits(elements: int, rows: int) -> None:
    assert most_rows(elements) == rows


# --- elements of the largest feature map ----------------------------------------------------------------------------
LAYERS = ("aten::convolution", "aten::addmm", "aten::mm")  # bmm would be attention's scores, which are never held


class Largest(TorchDispatchMode):
    """Elements of the largest map that a convolution or a linear layer reads or writes; its weights are none."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func._schema.name in LAYERS:
            read = args[1] if func._schema.name == "aten::addmm" else args[0]
            self.elements = max(self.elements, read.numel(), out.numel())
        return out


def largest(kind, config, size) -> int:  # type: ignore[no-untyped-def]
    with torch.device("meta"), torch.no_grad(), Largest() as seen:
        network = kind(**config)
        if kind is UNet2DConditionModel:
            z, text = torch.empty(1, config["in_channels"], *size), torch.empty(1, 77, config["cross_attention_dim"])
            network(z, torch.zeros(1), encoder_hidden_states=text)
        else:
            network.decode(torch.empty(1, config["latent_channels"], *size))
    return seen.elements


def test_stable_diffusion_at_512() -> None:
    assert unet_elements(SD15, (64, 64)) == 8 * 320 * 64 * 64
    assert decoder_elements(SD15_VAE, (64, 64)) == 256 * 512 * 512
    assert most_rows(unet_elements(SD15, (64, 64))) == 204 and most_rows(decoder_elements(SD15_VAE, (64, 64))) == 31
    assert most_rows(decoder_elements(TINY, (64, 64))) == 127


GROUPS = {"norm_num_groups": 8}  # a norm refuses groups of one value, such as 32 of 32 channels in a single cell
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4, "mid_block_type": None}
UNETS = {
    "no attention": (UNET | NO_ATTENTION, (8, 16)),
    "wide below": (UNET | {"block_out_channels": (32, 64, 256, 512)}, (7, 9)),
    "wide above": (UNET | {"block_out_channels": (256, 32, 32, 32)}, (7, 9)),
    "padded by hand": (UNET | {"downsample_padding": 0}, (8, 16)),
    "many latent channels": (UNET | {"in_channels": 700, "out_channels": 700}, (8, 16)),
    "one cell": (UNET | GROUPS, (1, 1)),
}


@pytest.mark.parametrize("name", UNETS)
def test_of_a_unet(name: str) -> None:
    config, size = UNETS[name]
    seen, said = largest(UNet2DConditionModel, config, size), unet_elements(config, size)
    assert seen <= said and (seen == said or name in ("padded by hand", "one cell"))  # text alone counts there


VAES = {
    "Stable Diffusion, thinned": (AutoencoderKL, VAE),
    "wide above": (AutoencoderKL, VAE | {"block_out_channels": (64, 8, 8, 8)}),
    "wide latents": (AutoencoderKL, VAE | {"block_out_channels": (8,) * 4, "latent_channels": 2000}),
    "tiny": (AutoencoderTiny, TINY_VAE | {"latent_channels": 4}),
    "tiny, times three": (AutoencoderTiny, TINY_VAE | {"upsampling_scaling_factor": 3, "latent_channels": 4}),
}


@pytest.mark.parametrize("name", VAES)
def test_of_a_decoder(name: str) -> None:
    kind, config = VAES[name]
    assert largest(kind, config, (7, 9)) == decoder_elements(config, (7, 9))
