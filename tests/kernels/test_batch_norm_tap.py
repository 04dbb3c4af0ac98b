"""BatchNorm with its moments: no worse than eager PyTorch of the same precision, judged in float64."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dfkd_kernels import batch_norm_launches
from dfkd_kernels import batch_norm_tap as module
from dfkd_kernels.batch_norm_launches import tile_of
from dfkd_kernels.batch_norm_tap import batch_norm_tap, batch_norm_tap_gradient_ref, batch_norm_tap_ref

triton = pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# that NaN stays NaN is tested, and the interpreter's numpy mentions them
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WHAT = {"y": (True, False), "moments": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Inputs:
    """Maps of deviation 1 about `offset`; the layer's mean is off by a third of that, its variance by a factor."""

    shape: tuple[int, int, int, int] = (2, 5, 7, 9)
    dtype: torch.dtype = F32
    order: str = "contiguous"
    of_y: str = "contiguous"  # memory format of y's gradient
    relu: bool = True
    affine: bool = True
    offset: float = 0.0
    seed: int = 0

    def tensors(self):
        """x, the layer, and gradients of y, m1 and m2 as large as those of a loss."""
        g = torch.Generator().manual_seed(self.seed)
        channels, pixels = self.shape[1], self.shape[2] * self.shape[3]
        mean = self.offset + torch.randn(channels, generator=g) / 3
        variance = 0.5 + torch.rand(channels, generator=g)
        weight, bias = (torch.randn(channels, generator=g) for _ in range(2)) if self.affine else (None, None)
        layer = [None if v is None else v.to(DEVICE) for v in (mean, variance, weight, bias)]
        x = (self.offset + torch.randn(self.shape, generator=g)).to(DEVICE, self.dtype)
        wide = torch.promote_types(self.dtype, F32)
        of_y = torch.randn(self.shape, generator=g).to(DEVICE, self.dtype)
        of_moments = [pixels**0.5 * torch.randn(self.shape[:2], generator=g).to(DEVICE, wide) for _ in range(2)]
        x, of_y = (v.contiguous(memory_format=FORMATS[order]) for v, order in ((x, self.order), (of_y, self.of_y)))
        return x, layer, (of_y, *of_moments)


def eager(x, mean, variance, weight, bias, eps, relu):
    """By PyTorch's own functions, and the moments as hooks take them."""
    y = F.batch_norm(x, *(None if v is None else v.to(x.dtype) for v in (mean, variance, weight, bias)), eps=eps)
    d = x.to(torch.promote_types(x.dtype, F32))
    d = d - mean.to(d)[None, :, None, None]
    return (y.relu() if relu else y), d.mean((2, 3)), d.square().mean((2, 3))


def results(function, x, layer, gradients, relu):
    """y, m1, m2, and dx for the gradients of y, of the moments and of both."""
    leaf = x.detach().requires_grad_()
    found = function(leaf, *layer, 1e-3, relu)
    of_x = []
    for y, moments in WHAT.values():
        taken = [(out, g) for out, g, use in zip(found, gradients, (y, moments, moments), strict=True) if use]
        of_x += torch.autograd.grad([out for out, _ in taken], leaf, [g for _, g in taken], retain_graph=True)
    return *(out.detach() for out in found), *of_x


def judge(i):
    """Within what eager errs by, a rounding of the result, and four of float32 of what is added up.

    Those are y's terms, and of dx the two gradients. Where y is so near 0 that precisions disagree on its sign, dx may
    be with or without dy.
    """
    x, layer, gradients = i.tensors()
    exact_layer = [None if v is None else v.double() for v in layer]
    truth = results(eager, x.double(), exact_layer, [g.double() for g in gradients], i.relu)
    expected = results(eager, x, layer, gradients, i.relu)
    found = results(batch_norm_tap, x, layer, gradients, i.relu)
    y, scale = eager(x.double(), *exact_layer, 1e-3, False)[0], (exact_layer[1] + 1e-3).rsqrt()
    if i.affine:
        scale = scale * exact_layer[2]
    terms = y.abs().max() + (0 if not i.affine else exact_layer[3].abs().max())
    near = (y.abs() <= 8 * torch.finfo(truth[1].dtype if i.dtype == F64 else F32).eps * terms) & i.relu
    added = (terms, *(v.abs().max() for v in truth[1:3]), *(gradients[0].double().abs().max() * scale.abs().max(),) * 3)
    for place, (mine, plain, exact, large) in enumerate(zip(found, expected, truth, added, strict=True)):
        assert mine.shape == plain.shape and mine.dtype == plain.dtype
        if place in (0, 3, 4, 5):
            assert mine.stride() == x.stride()
        error, allowed = ((v.double() - exact).abs() for v in (mine, plain))
        if place in (3, 5):
            error, allowed = (v.masked_fill(near, 0) for v in (error, allowed))
            assert near.sum() <= 1e-4 * near.numel() + 1
        if i.dtype == F64:  # eager is all there is to judge by
            assert error.max() <= 1e-12 * max(1.0, large)
            continue
        rounding = torch.finfo(mine.dtype).eps * exact.abs().max() + 4 * torch.finfo(F32).eps * large
        assert error.max() <= allowed.max() + rounding, (place, error.max(), allowed.max(), rounding)


# minimal, one channel, maps of one pixel, odd, prime, and maps as teachers have them
SHAPES = [(1, 1, 1, 1), (3, 1, 4, 4), (2, 7, 1, 1), (2, 3, 5, 7), (1, 13, 11, 17), (2, 70, 8, 8), (1, 16, 32, 32)]


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, dtype):
    for order in FORMATS:
        judge(Inputs(shape, dtype, order, order))
        judge(Inputs(shape, dtype, order, order, relu=False))


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("shape", [(1, 2, 131, 127), (1, 66, 17, 19)])
def test_maps_in_several_parts(shape, order):
    """Added up by a second launch, whose parts are several of its own."""
    pixels = shape[2] * shape[3]
    assert order == "contiguous" or pixels > tile_of(shape[1], pixels, True)[2]
    for dtype in (F32, BF16):
        judge(Inputs(shape, dtype, order, order))


@pytest.mark.parametrize("order", FORMATS)
def test_many_parts(order, monkeypatch):
    """More than the second launch adds up at a time: five, or eighteen."""
    for name, value in {"TILE": 32, "PROGRAM": 32, "CHANNELS": 4, "PARTS": 4, "ROWS": 8}.items():
        monkeypatch.setattr(batch_norm_launches, name, value)
    assert 143 / tile_of(5, 143, order == "channels_last")[2] > 4
    judge(Inputs((1, 5, 11, 13), F32, order, order))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("order", FORMATS)
def test_large_offsets_cancel_nothing(order, dtype):
    """Mean 1e3, deviation 1, the layer's mean with it: float32 keeps six digits of the difference."""
    i = Inputs((2, 5, 33, 31), dtype, order, order, offset=1e3)
    judge(i)
    x, layer, _ = i.tensors()
    exact = batch_norm_tap_ref(x.double(), *(v.double() for v in layer), 1e-3, True)
    found = batch_norm_tap(x, *layer, 1e-3, True)
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_in_any_layout():
    """In the other memory format, spread out from one value, and with gaps."""
    for order in FORMATS:
        x, layer, (of_y, *of_moments) = Inputs((2, 6, 5, 7), order=order).tensors()
        other = of_y.contiguous(memory_format=torch.channels_last)
        spread = of_y.mean((2, 3), keepdim=True).expand_as(of_y)
        gaps = F.pad(of_y, (1, 2))[..., 1:-2]
        for gradient in (of_y, other, spread, gaps):
            leaf = x.detach().requires_grad_()
            found = batch_norm_tap(leaf, *layer, 1e-3, True)
            (dx,) = torch.autograd.grad(found, leaf, (gradient, *of_moments))
            wanted = batch_norm_tap_gradient_ref(x, *layer, 1e-3, True, gradient, *of_moments)
            torch.testing.assert_close(dx, wanted)
            assert dx.stride() == x.stride()


def test_maps_that_are_not_dense_are_copied():
    x, layer, _ = Inputs((2, 6, 5, 7)).tensors()
    gaps = F.pad(x, (1, 2))[..., 1:-2]
    for mine, theirs in zip(batch_norm_tap(gaps, *layer), batch_norm_tap(x, *layer), strict=True):
        assert torch.equal(mine, theirs)
    leaf = gaps.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(batch_norm_tap(leaf, *layer)[2].sum(), leaf)
    torch.testing.assert_close(gradient, 2 * (x - layer[0][:, None, None]) / 35)


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("shape", [(7, 11, 9, 9), (4, 33, 17, 16)])
def test_an_image_does_not_feel_its_batch(shape, order):
    """Bit for bit, and so from one call to the next: nothing is added up in an order of chance."""
    x, layer, gradients = Inputs(shape, order=order, of_y=order).tensors()
    whole = results(batch_norm_tap, x, layer, gradients, True)
    for some in (slice(0, 1), slice(2, 4)):
        part = results(batch_norm_tap, x[some], layer, [g[some] for g in gradients], True)
        for every, mine in zip(whole, part, strict=True):
            assert torch.equal(every[some], mine)


def test_no_images():
    x, layer, gradients = Inputs((0, 3, 4, 4)).tensors()
    assert [v.shape[0] for v in results(batch_norm_tap, x, layer, gradients, True)] == [0] * 6


def test_nan_and_infinity_stay():
    x, layer, _ = Inputs((1, 2, 2, 2), affine=False).tensors()
    x[0, 0, 0, 0], x[0, 1, 0, 0] = torch.nan, torch.inf
    y, m1, m2 = batch_norm_tap(x, *layer, 1e-3, True)
    assert y[0, 0, 0, 0].isnan() and y[0, 1, 0, 0] == torch.inf and y.isfinite().sum() == 6
    assert m1[0, 0].isnan() and m1[0, 1] == torch.inf and m2[0, 0].isnan() and m2[0, 1] == torch.inf


@pytest.mark.parametrize("relu", [True, False])
def test_the_reference_is_its_definition(relu):
    """Its gradient is written down: against autograd, and its results against finite differences."""
    for affine in (True, False):
        x, layer, gradients = Inputs((2, 3, 4, 3), F64, relu=relu, affine=affine).tensors()
        layer = [None if v is None else v.double() for v in layer]
        plain = results(eager, x, layer, gradients, relu)
        for mine, wanted in zip(results(batch_norm_tap_ref, x, layer, gradients, relu), plain, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
        for (y, moments), wanted in zip(WHAT.values(), plain[3:], strict=True):
            of = [g if use else None for g, use in zip(gradients, (y, moments, moments), strict=True)]
            found = batch_norm_tap_gradient_ref(x, *layer, 1e-3, relu, *of)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        function = partial(batch_norm_tap_ref, eps=1e-3, relu=relu)
        assert torch.autograd.gradcheck(lambda v, f=function, given=layer: f(v, *given), x.requires_grad_())


@pytest.mark.parametrize("interpreted", [True, False])
def test_operator(interpreted, monkeypatch):
    """As autograd, fake tensors and the compiler see it; where no interpreter runs the CPU has the reference."""
    if not interpreted and DEVICE.type == "cpu":
        monkeypatch.setattr(module, "interpreted", lambda x: False)
    for order in FORMATS:
        x, layer, gradients = Inputs((2, 3, 2, 2), F64, order, order).tensors()
        x.requires_grad_()
        torch.library.opcheck(module._operator, (x, *layer, 1e-3, True))
        torch.library.opcheck(module._gradient_operator, (x.detach(), *layer, 1e-3, True, *gradients))
        torch.library.opcheck(module._gradient_operator, (x.detach(), *layer, 1e-3, True, None, gradients[1], None))
        few = x.detach()[:1, :, :, :1].clone(memory_format=FORMATS[order]).requires_grad_()
        assert torch.autograd.gradcheck(lambda v, given=layer: batch_norm_tap(v, *given, 1e-3, True), few)
        for dtype in (F32, F16, BF16):
            judge(Inputs((2, 4, 5, 3), dtype, order))


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_compiler_sees_one_graph(dynamic):
    """Both operators, whatever the batch; nothing is left to Python."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    def function(x, layer):
        y, m1, m2 = batch_norm_tap(x * 2, *layer, 1e-3, True)
        return y.square().sum() + m1.sum() + m2.square().sum()

    compiled = torch.compile(
        function, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True, dynamic=dynamic
    )
    for batch in (3, 6):  # sizes that differ: the compiler takes equal ones for the same
        x, layer, _ = Inputs((batch, 4, 5, 7)).tensors()
        gradients = []
        for way in (function, compiled):
            leaf = x.detach().requires_grad_()
            gradients += torch.autograd.grad(way(leaf, layer), leaf)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    found = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    for name in ("dfkd.batch_norm_tap.default", "dfkd.batch_norm_tap_gradient.default"):
        assert found.count(name) == (1 if dynamic else 2)
    torch._dynamo.reset()


def test_a_second_derivative_is_refused():
    x, layer, _ = Inputs().tensors()
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(batch_norm_tap(leaf, *layer)[2].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4)}, r"x: \(3, 4\) torch.float32; want \[B, C, H, W\]"),
        ({"x": torch.zeros(3, 4, 0, 1)}, r"x: \(3, 4, 0, 1\)"),
        ({"x": torch.zeros(3, 4, 1, 1, dtype=torch.int64)}, "int64; want .* floating"),
        ({"running_mean": torch.zeros(5)}, r"running_mean: \(5,\) torch.float32; want \(4,\)"),
        ({"running_var": torch.zeros(4, dtype=torch.int64)}, "running_var: .*int64; want"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
        ({"weight": torch.zeros(4, requires_grad=True)}, r"weight requires a gradient.*requires_grad_\(False\)"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(2, 4, 3, 3), "running_mean": torch.zeros(4), "running_var": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        batch_norm_tap(**given)


def test_tiles_are_of_the_layer_alone():
    """Of any size a program's pixels are whole tiles, and a warp has sixteen values a thread or fewer."""
    for channels in (1, 3, 16, 64, 70, 2048):
        for pixels in (1, 49, 64, 1024, 12544, 2**20):
            for nhwc in (True, False):
                wide, high, span, warps = tile_of(channels, pixels, nhwc)
                assert span % high == 0 and wide * high <= batch_norm_launches.TILE and 1 <= warps <= 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("shape", [(16, 64, 112, 112), (64, 256, 14, 14), (200, 64, 32, 32), (8, 2048, 7, 7)])
def test_natively_at_run_size(shape, order, dtype):
    i = Inputs(shape, dtype, order, order)
    judge(i)
    judge(replace(i, relu=False, of_y="contiguous"))
    test_an_image_does_not_feel_its_batch(shape, order)
