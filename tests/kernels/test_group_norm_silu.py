"""Group normalisation and SiLU: no worse than eager PyTorch of the same precision, judged in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dfkd_kernels import group_norm_silu as module
from dfkd_kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from dfkd_kernels.group_norm_tiles import STEPS, tiling

triton = pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# exp overflows in SiLU of a large negative number, which the interpreter's numpy mentions; its inverse is the 0 wanted
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
HALVES = (F16, BF16)


@dataclass(frozen=True)
class Inputs:
    """A feature map [batch, channels, *sides] of deviation 1 about `offset`, and a gradient of what becomes of it."""

    batch: int = 2
    channels: int = 8
    sides: tuple[int, ...] = (5, 7)
    groups: int = 4
    dtype: torch.dtype = F32
    nhwc: bool = False
    silu: bool = True
    offset: float = 0.0
    gradient_nhwc: bool | None = None
    seed: int = 0

    def tensors(self):
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.channels, *self.sides)
        x, dy = self.offset + torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        w, b = 1 + 0.5 * torch.randn(self.channels, generator=g), 0.5 * torch.randn(self.channels, generator=g)
        x, dy, w, b = (t.to(DEVICE, self.dtype) for t in (x, dy, w, b))
        of_gradient = self.nhwc if self.gradient_nhwc is None else self.gradient_nhwc
        return ordered(x, self.nhwc), w, b, ordered(dy, of_gradient)


def ordered(x, nhwc):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if nhwc else x


def eager(x, w, b, i):
    """PyTorch's own two operations. In NCHW: of a CPU's NHWC the variance is a difference of squares."""
    y = torch.group_norm(x.contiguous(), i.groups, w, b, 1e-5)
    return F.silu(y) if i.silu else y


def kernel(x, w, b, i):
    return group_norm_silu(x, w, b, i.groups, 1e-5, i.silu)


def reference(x, w, b, i):
    return group_norm_silu_ref(x, w, b, i.groups, 1e-5, i.silu)


def with_gradient(function, i, x, w, b, dy):
    leaf = x.detach().requires_grad_()
    y = function(leaf, w, b, i)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def cut_small(patch):
    """Small maps over many programs too, in tiles of a few pixels and channels."""
    for name, value in {"WHOLE": 0, "TILE": 32, "WIDE": 8, "PROGRAMS": 2, "PARTS": 8}.items():
        patch.setattr(f"dfkd_kernels.group_norm_tiles.{name}", value)


def judge(i):
    """Within what eager errs by, one rounding of the result, and six of float32 in the largest value.

    Three roundings are those of x - mean, of xh, and of w xh + b; SiLU's slope and the two sums of the gradient bring
    as many more. With an offset the mean itself is rounded, by half a unit in its last place. Of a group of few values
    a gradient is a small difference of terms as large as dy w / deviation, and those are rounded.
    """
    x, w, b, dy = i.tensors()
    truth = with_gradient(reference, i, *(t.double() for t in (x, w, b, dy)))
    expected, found = (with_gradient(f, i, x, w, b, dy) for f in (eager, kernel))
    _, _, rstd = module._operator(x.double(), w.double(), b.double(), i.groups, 1e-5, i.silu)
    terms = (1.0, rstd.max() * dy.double().abs().max() * w.double().abs().max()) if x.numel() else (0.0, 0.0)
    for mine, plain, exact, term in zip(found, expected, truth, terms, strict=True):
        assert mine.shape == x.shape and mine.dtype == x.dtype
        assert mine.numel() == 0 or ordered(mine, i.nhwc).stride() == mine.stride()
        if not mine.numel():
            continue
        error, allowed = ((t.double() - exact).abs().max() for t in (mine, plain))
        if i.dtype == F64:  # eager is all there is to judge by
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)
            continue
        size = exact.abs().max()
        rounding = torch.finfo(i.dtype).eps * size + 6 * torch.finfo(F32).eps * (size + abs(i.offset) + term)
        assert error <= allowed + rounding, (error, allowed, rounding)


# minimal, odd, prime; groups of one channel, one group; both sides of what one program keeps
SHAPES = [
    ((1, 1, (1, 1)), 1), ((2, 4, (3, 5)), 4), ((3, 6, (4, 4)), 1), ((1, 14, (7, 11)), 7), ((2, 10, (13,)), 5),
    ((1, 6, (2, 3, 5)), 3), ((3, 7, (1, 1)), 1), ((1, 3, (97, 89)), 3), ((2, 10, (45, 43)), 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_no_worse_than_eager(shape, groups, dtype):
    judge(Inputs(*shape, groups, dtype, nhwc=True))
    judge(Inputs(*shape, groups, dtype, nhwc=False, silu=False))


# channels and groups of Stable Diffusion's VAE and UNet, and of the demo's; sides reduced
REAL = [(512, 16, 32), (128, 40, 32), (320, 28, 32), (1280, 8, 32), (2560, 4, 32), (64, 8, 8)]


@pytest.mark.parametrize("channels, side, groups", REAL)
def test_real_channels(channels, side, groups):
    judge(Inputs(1, channels, (side, side), groups, F16, nhwc=True))


def test_real_channels_as_they_are_written():
    judge(Inputs(1, 320, (32, 32), 32, F32, nhwc=False))


@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("channels, side, groups", [(64, 8, 2), (48, 40, 2)])
@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_a_large_mean_cancels_nothing(channels, side, groups, nhwc, offset):
    """The deviation comes out to the rounding of x itself; a difference of squares would have no digit of it left."""
    i = Inputs(1, channels, (side, side), groups, offset=offset, nhwc=nhwc)
    judge(i)
    x, w, b, _ = i.tensors()
    _, mean, rstd = module._operator(x, w, b, groups, 1e-5, True)
    values = x.double().reshape(1, groups, -1)
    exact = 1 / (values.var(2, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-5, atol=0)
    unit = torch.finfo(F32).eps * abs(offset)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=0, atol=unit)


def test_an_outlier_does_not_hide_the_rest():
    """The first value is where a shifted difference of squares would take its shift from."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, :, 0, 0] = 1e4
    w, b = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    _, _, rstd = module._operator(x, w, b, 1, 1e-5, False)
    exact = 1 / x.double().var(correction=0).sqrt()
    torch.testing.assert_close(rstd.double().flatten()[0], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e3])
def test_a_constant_map_is_the_bias(value):
    x = torch.full((2, 4, 70, 70), value, device=DEVICE)
    w, b = torch.full((4,), 3.0, device=DEVICE), torch.arange(4.0, device=DEVICE)
    y = group_norm_silu(x, w, b, 2, silu=False)
    assert torch.equal(y, b.view(1, 4, 1, 1).expand_as(y))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("nhwc", [True, False])
def test_an_image_has_the_same_bits_whatever_comes_with_it(many, nhwc, monkeypatch):
    """Also where its place in the batch is one that no vector load could begin at."""
    if many:
        cut_small(monkeypatch)
    i = Inputs(3, 6, (9, 11), 2, nhwc=nhwc)
    x, w, b, dy = i.tensors()
    together = with_gradient(kernel, i, x, w, b, dy)
    again = with_gradient(kernel, i, x, w, b, dy)
    for row in (0, 2):
        alone = with_gradient(kernel, i, x[row : row + 1], w, b, dy[row : row + 1])
        for whole, repeated, one in zip(together, again, alone, strict=True):
            assert torch.equal(whole[row : row + 1], one) and torch.equal(whole, repeated)


@pytest.mark.parametrize("many", [False, True])
def test_orders_and_strides_change_no_more_than_the_last_bits(many, monkeypatch):
    if many:
        cut_small(monkeypatch)
    i = Inputs(2, 8, (7, 7), 2, F64)
    x, w, b, dy = i.tensors()
    want = with_gradient(kernel, i, x, w, b, dy)
    wider = F.pad(x, (1, 2))[..., 1:-2]
    crossed = x.transpose(2, 3).contiguous().transpose(2, 3)
    spread = torch.ones((), dtype=F64, device=DEVICE).expand(x.shape)
    for other, gradient in ((ordered(x, True), dy), (x, ordered(dy, True)), (wider, dy), (crossed, dy)):
        for mine, exact in zip(with_gradient(kernel, i, other, w, b, gradient), want, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    _, of_sum = with_gradient(kernel, i, x, w, b, spread)
    torch.testing.assert_close(of_sum, with_gradient(kernel, i, x, w, b, spread.contiguous())[1], rtol=0, atol=0)


def test_tokens_of_attention_are_not_copied():
    """[B, L, C] seen as [B, C, L], as diffusers' attention asks for it: the result lies as they do."""
    tokens = torch.randn(2, 33, 8, device=DEVICE)
    w, b = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y = group_norm_silu(tokens.transpose(1, 2), w, b, 4, silu=False)
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, F.group_norm(tokens.transpose(1, 2), 4, w, b), rtol=0, atol=2e-6)  # some roundings


@pytest.mark.parametrize("interpreted", [True, False])
def test_operator(interpreted, monkeypatch):
    """As autograd, fake tensors and the compiler see it; where no interpreter runs the CPU has the reference."""
    if not interpreted and DEVICE.type == "cpu":
        monkeypatch.setattr(module, "interpreted", lambda x: False)
    for i in (Inputs(1, 4, (3,), 2, F64), Inputs(2, 2, (2, 2), 1, F64, nhwc=True, silu=False)):
        x, w, b, dy = i.tensors()
        x.requires_grad_()
        torch.library.opcheck(module._operator, (x, w, b, i.groups, 1e-5, i.silu))
        _, mean, rstd = module._operator(x.detach(), w, b, i.groups, 1e-5, i.silu)
        torch.library.opcheck(module._gradient, (dy, x.detach(), mean, rstd, w, b, i.groups, i.silu))
        assert torch.autograd.gradcheck(lambda x, i=i, w=w, b=b: kernel(x, w, b, i), x)
        assert torch.autograd.gradcheck(lambda x, i=i, w=w, b=b: reference(x, w, b, i), x)
    for half in HALVES:
        judge(Inputs(2, 4, (3, 2), 2, half))
        judge(Inputs(2, 4, (3, 2), 2, half, nhwc=True))


def test_only_x_has_a_gradient_and_only_once():
    i = Inputs()
    x, w, b, dy = i.tensors()
    leaf = x.requires_grad_()
    loss = (kernel(leaf, w, b, i) * dy).sum()
    once, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        torch.autograd.grad(first.sum(), leaf)
    for wanting in (
        {"weight": w.clone().requires_grad_(), "bias": b},
        {"weight": w, "bias": b.clone().requires_grad_()},
    ):
        with pytest.raises(ValueError, match="requires a gradient, and there is one in x alone"):
            group_norm_silu(x, groups=4, **wanting)
        with torch.no_grad():
            group_norm_silu(x, groups=4, **wanting)


@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize(
    "channels, side", [(128, 512), (256, 256), (512, 128), (512, 64), (320, 64), (1280, 16), (7, 1000), (1, 4096)]
)
def test_tiles_cover_an_image_once_and_large_maps_are_many_programs(channels, side, nhwc):
    groups = math.gcd(channels, 32)
    tile = tiling(channels, groups, side * side, nhwc)
    assert tile.channels * tile.blocks >= channels > tile.channels * (tile.blocks - 1)
    covered = tile.pixels * tile.steps
    assert covered * tile.chunks >= side * side > covered * (tile.chunks - 1) and tile.steps <= STEPS
    if channels * side * side >= 2**20:  # more programs than an H100 has multiprocessors, for two images
        assert tile.blocks * tile.chunks >= 66
    parts = 2 * 4 * tile.chunks * channels  # bytes that chunks leave beside the image's in half precision
    assert side < 64 or parts <= 0.035 * 2 * channels * side * side


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x: \(3,\) torch.float32; want \[B, C"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "int64; want .* floating"),
        ({"groups": 3}, "4 channels in 3 groups"),
        ({"groups": 0}, "4 channels in 0 groups"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"weight": torch.zeros(3)}, r"weight: \(3,\) .* want \(4,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "bias: .*int64"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(2, 4, 3), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("channels, side", [(512, 64), (512, 128), (256, 256), (128, 512), (320, 64), (1280, 8)])
def test_natively_at_run_size(channels, side, dtype):
    for nhwc in (True, False):
        judge(Inputs(2, channels, (side, side), 32, dtype, nhwc=nhwc))


@pytest.mark.gpu
def test_natively_past_two_to_the_31st_element():
    """The last image's result is its result alone; 5 GB a tensor."""
    x = torch.randn(1, 128, 512, 512, device=DEVICE, dtype=F16).to(memory_format=torch.channels_last)
    many = x.expand(66, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    w, b = torch.ones(128, device=DEVICE, dtype=F16), torch.zeros(128, device=DEVICE, dtype=F16)
    assert many.numel() > 2**31
    assert torch.equal(group_norm_silu(many, w, b, 32)[-1:], group_norm_silu(x, w, b, 32))
