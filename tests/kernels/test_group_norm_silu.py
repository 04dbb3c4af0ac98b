"""Group normalisation and SiLU: no worse than eager PyTorch of the same precision, judged in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dfkd_kernels import group_norm_silu as module
from dfkd_kernels.group_norm_silu import STEPS, group_norm_silu, group_norm_silu_ref, tiling
from tests.properties import given, settings, st

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# exp overflows in SiLU of a large negative number, which the interpreter's numpy mentions; its inverse is the 0 wanted
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


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
        patch.setattr(module, name, value)


def judge(i):
    """Within what eager errs by, one rounding of the result, and six of float32 in the largest value.

    Three roundings are those of x - mean, of xh, and of w xh + b; SiLU's slope and the two sums of the gradient bring
    as many more. With an offset the mean itself is rounded, by half a unit in its last place. Of a group of few values
    a gradient is a small difference of terms as large as dy w / deviation, and those are rounded.
    """
    x, w, b, dy = i.tensors()
    truth = with_gradient(reference, i, *(t.double() for t in (x, w, b, dy)))
    expected, found = (with_gradient(f, i, x, w, b, dy) for f in (eager, kernel))
    for mine in found:
        assert (mine.shape, mine.dtype) == (x.shape, x.dtype) and ordered(mine, i.nhwc).stride() == mine.stride()
    if not x.numel():
        return
    _, _, rstd = module._operator(x.double(), w.double(), b.double(), i.groups, 1e-5, i.silu)
    terms = (1.0, rstd.max() * dy.double().abs().max() * w.double().abs().max())
    for mine, plain, exact, term in zip(found, expected, truth, terms, strict=True):
        if i.dtype == F64:  # eager is all there is to judge by
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)
            continue
        error, allowed = ((t.double() - exact).abs().max() for t in (mine, plain))
        size = exact.abs().max()
        rounding = torch.finfo(i.dtype).eps * size + 6 * torch.finfo(F32).eps * (size + abs(i.offset) + term)
        assert error <= allowed + rounding, (error, allowed, rounding)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((1, 1, (1, 1)), 1),  # minimal
        ((2, 4, (3, 5)), 4),  # groups of one channel
        ((1, 14, (7, 11)), 7),  # odd and prime
        ((2, 6, (13,)), 1),  # tokens, one group
        ((1, 10, (45, 43)), 2),  # more than one program keeps
    ],
)
def test_no_worse_than_eager(shape, groups, dtype):
    judge(Inputs(*shape, groups, dtype, nhwc=True))
    judge(Inputs(*shape, groups, dtype, nhwc=False, silu=False))


# channels and groups of Stable Diffusion's VAE and UNet, and of the demo's; sides reduced
@pytest.mark.parametrize("channels, side, groups", [(128, 40, 32), (1280, 4, 32), (64, 8, 8)])
def test_real_channels(channels, side, groups):
    judge(Inputs(1, channels, (side, side), groups, F16, nhwc=True))


@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("channels, side", [(16, 8), (16, 60)])  # a group a program; in many tiles
@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_a_large_mean_cancels_nothing(channels, side, nhwc, offset):
    """The deviation comes out to the rounding of x itself; a difference of squares would have no digit of it left."""
    i = Inputs(1, channels, (side, side), 2, offset=offset, nhwc=nhwc)
    judge(i)
    x, w, b, _ = i.tensors()
    _, mean, rstd = module._operator(x, w, b, 2, 1e-5, True)
    values = x.double().reshape(1, 2, -1)
    exact = 1 / (values.var(2, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=0, atol=torch.finfo(F32).eps * abs(offset))


def test_an_outlier_does_not_hide_the_rest():
    """The first value is where a shifted difference of squares would take its shift from."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, :, 0, 0] = 1e4
    _, _, rstd = module._operator(x, torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE), 1, 1e-5, False)
    exact = 1 / x.double().var(correction=0).sqrt()
    torch.testing.assert_close(rstd.double().flatten()[0], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, -1e3])
def test_a_constant_map_is_the_bias(value):
    x = torch.full((2, 4, 70, 70), value, device=DEVICE)
    w, b = torch.full((4,), 3.0, device=DEVICE), torch.arange(4.0, device=DEVICE)
    y = group_norm_silu(x, w, b, 2, silu=False)
    assert torch.equal(y, b.view(1, 4, 1, 1).expand_as(y))


@pytest.mark.parametrize("many", [False, True])
def test_orders_and_strides_change_no_more_than_the_last_bits(many, monkeypatch):
    if many:
        cut_small(monkeypatch)
    i = Inputs(1, 4, (5, 6), 2, F64)
    x, w, b, dy = i.tensors()
    want = with_gradient(kernel, i, x, w, b, dy)
    wider = F.pad(x, (1, 2))[..., 1:-2]
    crossed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for other, gradient in ((ordered(x, True), dy), (x, ordered(dy, True)), (wider, dy), (crossed, dy)):
        for mine, exact in zip(with_gradient(kernel, i, other, w, b, gradient), want, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    spread = torch.ones((), dtype=F64, device=DEVICE).expand(x.shape)
    of_sum, of_ones = (with_gradient(kernel, i, x, w, b, g)[1] for g in (spread, spread.contiguous()))
    assert torch.equal(of_sum, of_ones)


def test_tokens_of_attention_are_not_copied():
    """[B, L, C] seen as [B, C, L], as diffusers' attention asks for it: the result lies as they do."""
    tokens = torch.randn(2, 33, 8, device=DEVICE)
    w, b = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    y = group_norm_silu(tokens.transpose(1, 2), w, b, 4, silu=False)
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, F.group_norm(tokens.transpose(1, 2), 4, w, b), rtol=0, atol=2e-6)  # some roundings


@pytest.mark.parametrize("interpreted", [True, False])
def test_operator(interpreted, monkeypatch):
    """Checked for autograd, fake tensors and the compiler; where no interpreter runs the CPU has the reference."""
    if not interpreted and DEVICE.type == "cpu":
        monkeypatch.setattr(module, "interpreted", lambda x: False)
    for i in (Inputs(1, 4, (3,), 2, F64), Inputs(2, 2, (2, 2), 1, F64, nhwc=True, silu=False)):
        x, w, b, dy = i.tensors()
        x.requires_grad_()
        torch.library.opcheck(module._operator, (x, w, b, i.groups, 1e-5, i.silu))
        _, mean, rstd = module._operator(x.detach(), w, b, i.groups, 1e-5, i.silu)
        torch.library.opcheck(module._gradient, (dy, x.detach(), mean, rstd, w, b, i.groups, i.silu))
        assert torch.autograd.gradcheck(lambda x, i=i, w=w, b=b: kernel(x, w, b, i), x)
    judge(Inputs(0, 4, (3, 2), 2))
    judge(Inputs(2, 4, (3, 2), 2, F16))
    judge(Inputs(2, 4, (3, 2), 2, BF16, nhwc=True))


def test_only_x_has_a_gradient_and_only_once():
    i = Inputs()
    x, w, b, dy = i.tensors()
    leaf = x.requires_grad_()
    (first,) = torch.autograd.grad((kernel(leaf, w, b, i) * dy).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        torch.autograd.grad(first.sum(), leaf)
    for name in ("weight", "bias"):
        wanting = {"weight": w, "bias": b, name: w.clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} requires a gradient, and there is one in x alone"):
            group_norm_silu(x, groups=4, **wanting)
        with torch.no_grad():
            group_norm_silu(x, groups=4, **wanting)


@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("channels, side", [(128, 512), (512, 64), (320, 64), (1280, 16), (7, 1000), (1, 4096)])
def test_large_maps_are_many_programs_and_what_they_leave_is_small(channels, side, nhwc):
    cut = tiling(channels, math.gcd(channels, 32), side * side, nhwc)
    assert not cut.whole and cut.span % cut.high == 0 and cut.span <= STEPS * cut.high
    if channels * side * side >= 2**20:  # more programs than an H100 has multiprocessors, for two images
        assert -(-channels // cut.wide) * cut.spans >= 66
    parts = 2 * 4 * cut.spans * channels  # bytes that spans leave beside the image's in half precision
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
        ({"bias": torch.zeros(4, device="meta")}, "bias: .* on meta"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(2, 4, 3), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given)


@settings(deadline=None, max_examples=20)  # a busy machine is not a failure
@given(
    st.integers(0, 2), st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(1, 7), min_size=0, max_size=2),
    st.sampled_from([F64, F32, F16, BF16]), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, width, groups, sides, dtype, nhwc, gradient_nhwc, silu, many, seed):
    with pytest.MonkeyPatch.context() as patch:
        if many:
            cut_small(patch)
        judge(Inputs(batch, width * groups, tuple(sides), groups, dtype, nhwc, silu, 0.0, gradient_nhwc, seed))


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
