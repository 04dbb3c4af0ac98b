"""The kernel's group norms in a UNet and a VAE: the same results and gradients, and the way back."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd_engine.errors import EngineError
from dfkd_engine.graph import trace
from dfkd_engine.group_norms import (
    KERNELS,
    KernelGroupNorm,
    PlanarGroupNorm,
    Swapped,
    group_norms,
    running,
    set_group_norms,
)
from dfkd_engine.spec import TensorSpec
from tests.tiny_sd import TINY_VAE, UNET, VAE

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def frozen(network):
    return network.to(DEVICE).eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def tiny():
    """The UNet and the VAE of a Stable Diffusion pipeline; 8x8 latents, two of its depths, four groups.

    Groups of two values, which its deepest maps would have, are about as well conditioned as a sign.
    """
    torch.manual_seed(0)
    ends = {"down_block_types": UNET["down_block_types"][-2:], "up_block_types": UNET["up_block_types"][:2]}
    less = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 4}
    unet = UNet2DConditionModel(**UNET | ends | less)
    return frozen(unet), frozen(AutoencoderKL(**VAE | {"norm_num_groups": 4}))


def denoised(unet, z, context):
    leaf = z.detach().requires_grad_()
    found = unet(leaf, 5, context).sample
    return found.detach(), torch.autograd.grad(found.square().sum(), leaf)[0]


def decoded(vae, z):
    leaf = z.detach().requires_grad_()
    found = vae.decode(leaf).sample
    return found.detach(), torch.autograd.grad(found.square().sum(), leaf)[0]


def close(found, wanted):
    """float32 sums in another order, through a few dozen layers."""
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=2e-5 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [5, 40])
def test_small_maps_in_half_precision_go_by_planes_on_a_cpu(dtype, side):
    """To the digits of the precision, in the map's memory order; and not in a graph."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.GroupNorm(4, 12)).to(dtype).requires_grad_(False)
    with torch.no_grad():
        network[0].weight.normal_(), network[0].bias.normal_()
    set_group_norms(network, "torch")
    assert type(network[0]) is PlanarGroupNorm
    x = torch.randn(3, 12, side, side).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    exact, seen = x.detach().double().requires_grad_(), []
    wanted = copy.deepcopy(network).double()(exact)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.native_group_norm.default:
                seen.append(args[0].is_contiguous())
            return func(*args, **kwargs or {})

    with Watch():
        found = network(x)
    assert seen == [side == 5]
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    # of a rounding or two in the end
    assert (found.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    gradients = [torch.autograd.grad(y.square().sum(), of)[0].double() for y, of in ((found, x), (wanted, exact))]
    # of a few roundings
    assert (gradients[0] - gradients[1]).abs().max() <= 8 * torch.finfo(dtype).eps * gradients[1].abs().max()
    graph = trace(network, [TensorSpec("x", (None, 12, side, side), str(dtype).removeprefix("torch."))])
    assert not any("clone" in str(node.target) for node in graph.module.graph.nodes)
    set_group_norms(network.float(), "torch")
    assert type(network[0]) is nn.GroupNorm


def layers(network):
    return [(name, type(module)) for name, module in network.named_modules()]


def test_a_tiny_pipeline_and_the_way_back(tiny):
    unet, vae = tiny
    torch.manual_seed(1)
    z, context = torch.randn(1, 4, 8, 8, device=DEVICE), torch.randn(1, 7, 32, device=DEVICE)
    before, plain = [layers(n) for n in tiny], (denoised(unet, z, context), decoded(vae, z[..., :2, :2]))
    weights = [{k: v.clone() for k, v in n.state_dict().items()} for n in tiny]
    with running(tiny, "triton"):
        found = [group_norms(n) for n in tiny]
        for count, network, own in zip(found, tiny, weights, strict=True):
            assert count.fused == count.layers > 10
            assert count.with_silu > count.layers / 2
            assert network.state_dict().keys() == own.keys()
            assert all(torch.equal(v, own[k]) for k, v in network.state_dict().items())
        close(denoised(unet, z, context), plain[0])
        close(decoded(vae, z[..., :2, :2]), plain[1])
    assert [group_norms(n) for n in tiny] == [Swapped(c.layers, 0, 0) for c in found]
    assert [layers(n) for n in tiny] == before
    again = denoised(unet, z, context), decoded(vae, z[..., :2, :2])
    for one, other in zip(plain, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def silus_of(network, call):
    """How often SiLU runs by itself."""
    count = 0

    def counted(module, *_):
        nonlocal count
        count += isinstance(module, nn.SiLU)

    handle = nn.modules.module.register_module_forward_hook(counted)
    try:
        with torch.no_grad():
            call()
    finally:
        handle.remove()
    return count


def test_every_silu_of_a_decoder_is_taken(tiny):
    _, vae = tiny
    z = torch.randn(1, 4, 2, 2, device=DEVICE)
    assert silus_of(vae, lambda: vae.decode(z)) > 10
    with running((vae,), "triton"):
        assert silus_of(vae, lambda: vae.decode(z)) == 0


class Foreign(nn.Module):
    """A block with the names of diffusers', that goes its own way between norm and activation."""

    def __init__(self):
        super().__init__()
        self.norm1, self.nonlinearity, self.conv1 = nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv1(self.nonlinearity(1 + self.norm1(x)))


@pytest.mark.parametrize(
    "block, expected",
    [
        (lambda: Foreign(), Swapped(1, 1, 0)),
        (lambda: ResnetBlock2D(in_channels=4, temb_channels=6, groups=2), Swapped(2, 2, 2)),
        (lambda: ResnetBlock2D(in_channels=4, temb_channels=None, groups=2), Swapped(2, 2, 2)),
        (lambda: ResnetBlock2D(in_channels=4, temb_channels=4, groups=2, skip_time_act=True), Swapped(2, 2, 2)),
        (lambda: ResnetBlock2D(in_channels=4, temb_channels=6, groups=2, non_linearity="gelu"), Swapped(2, 2, 0)),
        (
            lambda: ResnetBlock2D(in_channels=4, temb_channels=6, groups=2, time_embedding_norm="scale_shift"),
            Swapped(2, 2, 0),
        ),
        (lambda: nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.SiLU()), Swapped(1, 0, 0)),
    ],
)
def test_a_block_is_taken_as_far_as_it_is_known(block, expected):
    torch.manual_seed(0)
    network = nn.ModuleList([frozen(block())])
    x, temb = torch.randn(2, 4, 3, 3, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    given = (x,)
    if isinstance(network[0], ResnetBlock2D):
        own = network[0].time_emb_proj
        given = (x, None if own is None else temb[:, : own.in_features])
    want = network[0](*given)
    assert set_group_norms(network, "triton") == expected
    torch.testing.assert_close(network[0](*given), want, rtol=0, atol=1e-5)
    assert set_group_norms(network, "triton") == expected  # once more changes nothing
    copied = copy.deepcopy(network).double()
    set_group_norms(copied, "torch")
    assert not any(isinstance(m, KernelGroupNorm) for m in copied.modules())
    exact = copied[0](*(t if t is None else t.double() for t in given))
    torch.testing.assert_close(network[0](*given).double(), exact, rtol=0, atol=1e-5)


def test_a_network_without_group_norms_and_refusals():
    assert set_group_norms(frozen(AutoencoderTiny(**TINY_VAE)), "triton") == Swapped(0, 0, 0)
    with pytest.raises(EngineError, match="'fast' is unknown: known are torch, triton"):
        set_group_norms(nn.GroupNorm(1, 1), "fast")
    trainable = nn.Sequential(nn.GroupNorm(2, 4))
    with pytest.raises(EngineError, match="requires_grad_"):
        set_group_norms(trainable, "triton")
    assert type(trainable[0]) is nn.GroupNorm


def test_a_graph_has_the_kernel_only_where_it_is_asked_for():
    torch.manual_seed(0)
    network = frozen(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))

    def gradient(x):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = network(leaf)
            return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]

    spec = [TensorSpec("x", (None, 3, 5, 5), "float32")]
    with running((network,), "triton"):
        with pytest.raises(EngineError, match="group_norm_silu"):
            trace(gradient, spec, device=DEVICE)
        fused = trace(gradient, spec, device=DEVICE, also=KERNELS)
        assert {node.target for node in fused.module.graph.nodes} >= KERNELS
        for rows in (1, 2, 7):
            x = torch.randn(rows, 3, 5, 5, device=DEVICE)
            close(fused(x), gradient(x))
    plain = trace(gradient, spec, device=DEVICE, also=KERNELS)
    assert not {node.target for node in plain.module.graph.nodes} & KERNELS
