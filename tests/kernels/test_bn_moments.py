"""BatchNorm with its moments: no worse than eager PyTorch of the same precision, judged in float64."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dfkd_kernels import bn_moments as module
from dfkd_kernels.bn_moments import bn_moments, bn_moments_gradient_ref, bn_moments_ref, tile_of
from tests.properties import given, settings, st

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# that NaN stays NaN is tested, and the interpreter's numpy mentions them
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-3


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
    """BatchNorm by PyTorch's own functions, and the moments as hooks take them."""
    y = F.batch_norm(x, *(None if v is None else v.to(x.dtype) for v in (mean, variance, weight, bias)), eps=eps)
    d = x.to(torch.promote_types(x.dtype, F32))
    d = d - mean.to(d)[None, :, None, None]
    return (y.relu() if relu else y), d.mean((2, 3)), d.square().mean((2, 3))


def results(function, x, layer, gradients, relu):
    """y, m1, m2, and dx for the gradient of y, those of the moments, and all."""
    leaf = x.detach().requires_grad_()
    found = function(leaf, *layer, EPS, relu)
    of_x = []
    for asked in (slice(0, 1), slice(1, 3), slice(0, 3)):
        of_x += torch.autograd.grad(found[asked], leaf, gradients[asked], retain_graph=True)
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
    found = results(bn_moments, x, layer, gradients, i.relu)
    y, scale = eager(x.double(), *exact_layer, EPS, False)[0], (exact_layer[1] + EPS).rsqrt()
    if i.affine:
        scale = scale * exact_layer[2]
    terms = y.abs().max() + (exact_layer[3].abs().max() if i.affine else 0)
    near = (y.abs() <= 8 * torch.finfo(torch.promote_types(i.dtype, F32)).eps * terms) & i.relu
    assert near.sum() <= 1e-4 * near.numel() + 1
    added = (terms, *(v.abs().max() for v in truth[1:3]), *(gradients[0].double().abs().max() * scale.abs().max(),) * 3)
    for name, mine, plain, exact, large in zip(
        ("y", "m1", "m2", "dx of y", "dx of moments", "dx"), found, expected, truth, added, strict=True
    ):
        assert mine.shape == plain.shape and mine.dtype == plain.dtype
        if mine.dim() == 4:
            assert mine.stride() == x.stride()
        error, allowed = ((v.double() - exact).abs() for v in (mine, plain))
        if name in ("dx of y", "dx"):
            error, allowed = (v.masked_fill(near, 0) for v in (error, allowed))
        if i.dtype == F64:  # eager is all there is to judge by
            assert error.max() <= 1e-12 * max(1.0, large)
            continue
        rounding = torch.finfo(mine.dtype).eps * exact.abs().max() + 4 * torch.finfo(F32).eps * large
        assert error.max() <= allowed.max() + rounding, (name, error.max(), allowed.max(), rounding)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (2, 70, 8, 8)])  # minimal; odd and prime; two blocks
def test_no_worse_than_eager(shape, dtype):
    for order in FORMATS:
        judge(Inputs(shape, dtype, order, order, relu=order == "contiguous"))


@pytest.mark.parametrize("order", FORMATS)
def test_maps_in_several_parts(order):
    shape = (1, 66, 17, 19) if order == "channels_last" else (1, 2, 131, 127)
    pixels = shape[2] * shape[3]
    assert pixels > tile_of(shape[1], pixels, order == "channels_last")[2]
    for dtype in (F32, BF16):
        judge(Inputs(shape, dtype, order, order))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("order", FORMATS)
def test_large_offsets_cancel_nothing(order, dtype):
    """Mean 1e3, deviation 1, the layer's mean with it: float32 keeps six digits of the difference."""
    i = Inputs((1, 5, 33, 31), dtype, order, order, offset=1e3)
    judge(i)
    x, layer, _ = i.tensors()
    exact = bn_moments_ref(x.double(), *(v.double() for v in layer), EPS, True)
    for mine, wanted in zip(bn_moments(x, *layer, EPS, True)[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", FORMATS)
def test_gradients_in_any_layout(order):
    """In the other memory format, spread out from one value, and with gaps."""
    x, layer, (of_y, *of_moments) = Inputs((2, 6, 5, 7), order=order).tensors()
    other = of_y.contiguous(memory_format=torch.channels_last)
    spread = of_y.mean((2, 3), keepdim=True).expand_as(of_y)
    gaps = F.pad(of_y, (1, 2))[..., 1:-2]
    for gradient in (of_y, other, spread, gaps):
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(bn_moments(leaf, *layer, EPS, True), leaf, (gradient, *of_moments))
        wanted = bn_moments_gradient_ref(x, *layer, EPS, True, gradient, *of_moments)
        torch.testing.assert_close(dx, wanted)
        assert dx.stride() == x.stride()


def test_maps_that_are_not_dense_are_copied():
    x, layer, _ = Inputs((2, 6, 5, 7)).tensors()
    leaf = F.pad(x, (1, 2))[..., 1:-2].requires_grad_()
    found = bn_moments(leaf, *layer)
    for mine, theirs in zip(found, bn_moments(x, *layer), strict=True):
        assert torch.equal(mine, theirs)
    (gradient,) = torch.autograd.grad(found[2].sum(), leaf)
    torch.testing.assert_close(gradient, 2 * (x - layer[0][:, None, None]) / 35)


def test_no_images():
    x, layer, gradients = Inputs((0, 3, 4, 4)).tensors()
    assert [v.shape[0] for v in results(bn_moments, x, layer, gradients, True)] == [0] * 6


def test_nan_and_infinity_stay():
    x, layer, _ = Inputs((1, 2, 2, 2), affine=False).tensors()
    x[0, 0, 0, 0], x[0, 1, 0, 0] = torch.nan, torch.inf
    y, m1, m2 = bn_moments(x, *layer, EPS, True)
    assert y[0, 0, 0, 0].isnan() and y[0, 1, 0, 0] == torch.inf and y.isfinite().sum() == 6
    assert m1[0, 0].isnan() and m1[0, 1] == torch.inf and m2[0, 0].isnan() and m2[0, 1] == torch.inf


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_reference_is_its_definition(affine, relu):
    """The written gradient against autograd, and the results against finite differences."""
    x, layer, gradients = Inputs((2, 3, 4, 3), F64, relu=relu, affine=affine).tensors()
    layer = [None if v is None else v.double() for v in layer]
    plain = results(eager, x, layer, gradients, relu)
    for mine, wanted in zip(results(bn_moments_ref, x, layer, gradients, relu), plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    of_y, of_m1, of_m2 = gradients
    for given_gradients, wanted in zip(((of_y, None, None), (None, of_m1, of_m2), gradients), plain[3:], strict=True):
        found = bn_moments_gradient_ref(x, *layer, EPS, relu, *given_gradients)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    function = partial(bn_moments_ref, eps=EPS, relu=relu)
    assert torch.autograd.gradcheck(lambda v: function(v, *layer), x.requires_grad_())


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("order", FORMATS)
def test_operator(order, interpreted, monkeypatch):
    """Checked for autograd, fake tensors and the compiler; where no interpreter runs the CPU has the reference."""
    if not interpreted and DEVICE.type == "cpu":
        monkeypatch.setattr(module, "interpreted", lambda x: False)
    x, layer, gradients = Inputs((2, 3, 2, 2), F64, order, order).tensors()
    torch.library.opcheck(module._operator, (x.requires_grad_(), *layer, EPS, True))
    torch.library.opcheck(module._gradient_operator, (x.detach(), *layer, EPS, True, None, gradients[1], None))
    few = x.detach()[:1, :, :, :1].clone(memory_format=FORMATS[order]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: bn_moments(v, *layer, EPS, True), few)
    judge(Inputs((2, 4, 5, 3), F16, order))


def test_the_compiler_sees_one_graph():
    """Both operators, whatever the batch; nothing is left to Python."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(x, layer):
        y, m1, m2 = bn_moments(x * 2, *layer, EPS, True)
        return y.square().sum() + m1.sum() + m2.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True, dynamic=True
    )
    for batch in (3, 6):  # sizes that differ: the compiler takes equal ones for the same
        x, layer, _ = Inputs((batch, 4, 5, 7)).tensors()
        leaf = x.requires_grad_()
        gradients = [torch.autograd.grad(way(leaf, layer), leaf)[0] for way in (function, compiled)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    found = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert found.count("dfkd.bn_moments.default") == found.count("dfkd.bn_moments_gradient.default") == 1
    torch._dynamo.reset()


def test_a_second_derivative_is_refused():
    x, layer, _ = Inputs().tensors()
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(bn_moments(leaf, *layer)[2].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4)}, r"x: \(3, 4\) torch.float32; want \[B, C, H, W\]"),
        ({"x": torch.zeros(3, 4, 0, 1)}, r"x: \(3, 4, 0, 1\)"),
        ({"x": torch.zeros(3, 4, 1, 1, dtype=torch.int64)}, "int64; want .* floating"),
        ({"running_mean": torch.zeros(5)}, r"running_mean: \(5,\) torch.float32 .* want \(4,\)"),
        ({"running_var": torch.zeros(4, dtype=torch.int64)}, "running_var: .*int64 .* want"),
        ({"bias": torch.zeros(4, device="meta")}, "bias: .* on meta"),
        ({"weight": torch.zeros(4, requires_grad=True)}, r"weight requires a gradient.*requires_grad_\(False\)"),
    ],
)
def test_refusals(change, message):
    given = {"x": torch.zeros(2, 4, 3, 3), "running_mean": torch.zeros(4), "running_var": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        bn_moments(**given)


@settings(deadline=None, max_examples=12)  # a busy machine is not a failure
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([F64, F32, F16, BF16]), st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(FORMATS)),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(shape, dtype, order, of_y, relu, affine, small, seed):
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several parts of several tiles
            for name, value in {"TILE": 16, "PROGRAM": 64, "CHANNELS": 4}.items():
                patch.setattr(module, name, value)
        judge(Inputs(shape, dtype, order, of_y, relu, affine, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("shape", [(16, 64, 112, 112), (64, 256, 14, 14), (200, 64, 32, 32), (8, 2048, 7, 7)])
def test_natively_at_run_size(shape, order, dtype):
    i = Inputs(shape, dtype, order, order)
    judge(i)
    judge(replace(i, relu=False, of_y="contiguous"))
    x, layer, gradients = i.tensors()
    once, again = (results(bn_moments, x, layer, gradients, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
