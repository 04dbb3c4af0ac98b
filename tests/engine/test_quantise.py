"""Eight bits: two operations, the graph against a network quantised by hand, ONNX, and TensorRT without a GPU."""

from functools import cache

import pytest
import torch
from torch import nn

from dfkd_engine.backends import get
from dfkd_engine.backends.onnxruntime import MODEL
from dfkd_engine.devices import family
from dfkd_engine.errors import EngineError
from dfkd_engine.export import to_onnx
from dfkd_engine.graph import trace
from dfkd_engine.quantise import NARROW, QUANTISE, Amax, dequantise, is_quantised, quantise, quantised
from dfkd_engine.spec import TensorSpec
from tests.engine.small_graphs import arguments, graph, networks, spec

RUNS_ONNX = pytest.mark.skipif(
    get("onnxruntime").unusable("cpu") is not None, reason=str(get("onnxruntime").unusable("cpu"))
)
LARGEST = {"int8": 127, "fp8": 448}
STEP = {"int8": 1 / 50, "fp8": 1 / 16}  # larger than the rounding error of a few hundred normal numbers


def by_hand(x, amax, narrow, axis=None):
    """x rounded to eight bits and back, by numpy-like arithmetic in float64 and a table of all 8-bit values."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    scale = (torch.as_tensor(amax, dtype=torch.float64) / LARGEST[narrow]).float().reshape(shape)
    values = torch.arange(256, dtype=torch.uint8).view(NARROW[narrow]).double()
    values = values[values.isfinite()].unique()
    units = (x.float() / scale).double().clamp(values[0], values[-1])
    above = torch.searchsorted(values, units).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    nearest = torch.where(units - low < high - units, low, high)
    return nearest.float() * scale


def seeded(make):
    """A layer, its weights always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().requires_grad_(False)


def layers_of(network):
    return {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@cache
def magnitudes(skip=("conv_in", "conv_out")):
    """Magnitudes in the small UNet by layer name, on inputs other than those of the tests."""
    unet, found = networks().unet, {}
    hooks = []
    for name, layer in layers_of(unet).items():
        if name not in skip:

            def see(layer, given, _, name=name):
                found[name] = max(found.get(name, 0.0), given[0].abs().max().item())

            hooks.append(layer.register_forward_hook(see))
    for seed in range(3):
        networks().function("unet")(*arguments("unet", 4, 10 + seed))
    for hook in hooks:
        hook.remove()
    weights = {name: layer.weight.flatten(1).abs().amax(1) for name, layer in layers_of(unet).items()}
    return {name: Amax(amax, weights[name]) for name, amax in found.items()}


def placed(layers):
    """By the names of the traced graph, whose function is a method of Networks."""
    known = {node.meta.get("module", "") for node in graph("unet").module.graph.nodes}
    prefix = next(m.removesuffix("conv_in") for m in known if m.endswith("conv_in"))
    return {prefix + name: amax for name, amax in layers.items()}


@cache
def small(narrow):
    return quantised(graph("unet"), placed(magnitudes()), narrow)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class TestOperations:
    def test_int8_rounds_halves_to_even_and_clamps(self):
        x = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 126.6])
        q = quantise(x, torch.tensor(1.0), "int8")
        assert q.dtype == torch.int8 and q.tolist() == [0, 0, 2, 2, 0, -2, 127, -128, 127]

    def test_fp8_rounds_and_clamps(self):
        x = torch.tensor([0.0, 1.0, 17.0, 449.0, 1e9, -1e9])
        assert quantise(x, torch.tensor(1.0), "fp8").float().tolist() == [0, 1, 16, 448, 448, -448]

    @pytest.mark.parametrize("narrow", NARROW)
    def test_there_and_back(self, narrow):
        x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
        scale = x.abs().max() / LARGEST[narrow]
        back = dequantise(quantise(x, scale, narrow), scale, 0)
        torch.testing.assert_close(back, by_hand(x, x.abs().max(), narrow), rtol=1e-6, atol=1e-7)
        assert 0 < relative(back, x) < STEP[narrow]

    def test_a_scale_for_each_channel(self):
        q = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        scale = torch.tensor([10.0, 0.5])
        assert dequantise(q, scale, 0).tolist() == [[10, 20], [1.5, 2]]
        assert dequantise(q, scale, 1).tolist() == [[10, 1], [30, 2]]


class TestGraph:
    @pytest.mark.parametrize("narrow", NARROW)
    def test_it_is_the_network_with_rounded_factors(self, narrow):
        """Weights rounded in place and inputs rounded before every layer, which no graph is needed for."""
        own = networks().to("cpu", torch.float32)
        for name, layer in layers_of(own.unet).items():
            if name in magnitudes():
                amax = magnitudes()[name]
                layer.weight.data = by_hand(layer.weight, amax.weight, narrow, axis=0)

                def round_input(layer, given, amax=amax):
                    return (by_hand(given[0], amax.input, narrow), *given[1:])

                layer.register_forward_pre_hook(round_input)
        given = arguments("unet", 3)
        (want,), (got,) = own.function("unet")(*given), small(narrow)(*given)
        (exact,) = networks().function("unet")(*given)
        assert relative(want, exact) > 1e-3  # so what is compared is not nothing
        # sums in another order can put a value into the next of 256 steps, and on from there
        assert relative(got, want) < relative(want, exact) / 3

    @pytest.mark.parametrize("narrow", NARROW)
    def test_one_layer_exactly(self, narrow):
        layer = seeded(lambda: nn.Conv2d(3, 5, 3, padding=1))
        traced = trace(lambda x: layer(x), [TensorSpec("x", (None, 3, 4, 4), "float32")])
        amax = Amax(2.0, layer.weight.flatten(1).abs().amax(1))
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        (got,) = quantised(traced, {"layer": amax}, narrow)(x)
        weight = by_hand(layer.weight, amax.weight, narrow, axis=0)
        want = torch.conv2d(by_hand(x, 2.0, narrow), weight, layer.bias, padding=1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_weights_are_kept_in_eight_bits(self):
        narrow = small("int8").module
        kept = {name: value for name, value in narrow.named_buffers() if value.dtype == torch.int8}
        assert len(kept) == len(magnitudes())
        held = sum(value.numel() * value.element_size() for value in narrow.buffers())
        before = sum(value.numel() * value.element_size() for value in graph("unet").module.buffers())
        assert held < before / 2

    def test_layers_with_one_input_share_its_pair(self):
        nodes = list(small("int8").module.graph.nodes)
        attention = [
            n for n in nodes if n.meta.get("module", "").endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v"))
        ]
        products = [n for n in attention if n.target is torch.ops.aten.mm.default]
        assert len(products) == 3 and len({n.args[0] for n in products}) == 1
        assert sum(n.target is QUANTISE for n in nodes) < len(magnitudes())

    def test_the_graph_it_was_made_of_stays(self):
        assert is_quantised(small("int8")) and not is_quantised(graph("unet"))

    def test_a_channel_of_zeros_and_half_precision(self):
        layer = nn.Linear(4, 3, bias=False).requires_grad_(False).half()
        layer.weight[0] = 0
        layer.weight[1] = 1e-4
        traced = trace(lambda x: layer(x.half()).float(), [TensorSpec("x", (None, 4), "float32")])
        narrow = quantised(traced, {"layer": Amax(0.0, layer.weight.abs().amax(1).float())}, "int8")
        (got,) = narrow(torch.ones(2, 4))
        assert got.isfinite().all() and (got[:, 0] == 0).all()
        scales = [v for n, v in narrow.module.named_buffers() if n.endswith("scale")]
        assert all(v.dtype == torch.float16 and (v >= torch.finfo(torch.float16).tiny).all() for v in scales)

    def test_what_cannot_be_quantised_is_refused_by_name(self):
        amax = Amax(1.0, torch.ones(5))
        with pytest.raises(EngineError, match=r"nowhere\.conv cannot be quantised: the graph has no product of"):
            quantised(graph("unet"), {"nowhere.conv": amax}, "int8")
        name, own = next(iter(placed(magnitudes()).items()))
        with pytest.raises(EngineError, match=f"of {name} cannot be quantised: it has .* output channels"):
            quantised(graph("unet"), {name: Amax(1.0, own.weight[:-1])}, "int8")
        with pytest.raises(EngineError, match=f"of {name} cannot be quantised: the magnitudes .* not finite"):
            quantised(graph("unet"), {name: Amax(float("nan"), own.weight)}, "int8")
        up = nn.ConvTranspose2d(3, 5, 2).requires_grad_(False)
        traced = trace(lambda x: up(x), [TensorSpec("x", (None, 3, 4, 4), "float32")])
        with pytest.raises(EngineError, match="of up cannot be quantised: its second factor"):
            quantised(traced, {"up": amax}, "int8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """narrow -> the folder of the small quantised UNet's ONNX file."""

    @cache
    def of(narrow):
        place = tmp_path_factory.mktemp(narrow)
        to_onnx(small(narrow), place / MODEL)
        return place

    return of


@RUNS_ONNX
class TestOnnx:
    def test_pairs_stand_at_the_products(self, model):
        """Nothing was folded: 8-bit initialisers, each dequantised right at its product, and no wide copy of one."""
        import onnx

        written, kind = onnx.load(model("int8") / MODEL), onnx.TensorProto.INT8
        assert [(o.domain, o.version) for o in written.opset_import] == [("", 19)]
        made = {output: node for node in written.graph.node for output in node.output}
        stored = {i.name: i for i in written.graph.initializer}
        products = [n for n in written.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
        weighted = [n for n in products if (made.get(n.input[1]) or n).op_type == "DequantizeLinear"]
        assert len(weighted) == len(magnitudes())
        for node in weighted:
            weight, source = (made[name] for name in (node.input[1], node.input[0]))
            assert stored[weight.input[0]].data_type == kind
            assert source.op_type == "DequantizeLinear" and made[source.input[0]].op_type == "QuantizeLinear"
        shapes = {tuple(i.dims) for i in stored.values() if i.data_type == kind and i.dims}
        wide = {tuple(i.dims) for i in stored.values() if i.data_type == onnx.TensorProto.FLOAT}
        assert len(shapes) > 5 and not shapes & wide

    def test_onnx_runtime_computes_what_the_graph_says(self, model):
        run = get("onnxruntime").load(model("int8"), spec("unet", "onnxruntime"), "cpu")
        given = arguments("unet", 4)
        (want,), (got,), (exact,) = small("int8")(*given), run(*given), networks().function("unet")(*given)
        assert relative(got, want) < relative(want, exact) / 3  # sums in another order, as above

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("narrow", NARROW)
    def test_one_layer_to_the_last_digits(self, narrow, dtype, tmp_path):
        import onnxruntime

        layer = seeded(lambda: nn.Linear(8, 6)).to(dtype)
        traced = trace(lambda x: layer(x.to(dtype)).float(), [TensorSpec("x", (None, 8), "float32")])
        amax = Amax(2.5, layer.weight.float().abs().amax(1))
        own = quantised(traced, {"layer": amax}, narrow)
        to_onnx(own, tmp_path / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        x = 1.5 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        (got,) = session.run(None, {"x": x.numpy()})
        # Half precision rounds the quotients before they are rounded to a step, each program in its own way: 3e-3 was
        # the most of six seeds.
        assert relative(torch.from_numpy(got), own(x)[0]) < (1e-6 if dtype == torch.float32 else 6e-3)
        assert relative(own(x)[0], traced(x)[0]) > 2e-2  # rounded, and clamped beyond 2.5


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize(
    "narrow, targets, builds",
    [
        ("int8", ("sm_80", "sm_86", "sm_89", "sm_120"), True),
        ("fp8", ("sm_89", "sm_120"), True),
        ("fp8", ("sm_80",), False),  # Ampere has no fp8
    ],
)
def test_tensorrt_builds_it_without_a_gpu(narrow, targets, builds, model):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (the extra rtx)")
    own, file = spec("unet", "tensorrt-rtx", family(targets)), model(narrow) / MODEL
    if builds:
        assert get("tensorrt-rtx").build(file, own).nbytes
    else:
        with pytest.raises(EngineError, match="unet cannot be compiled by tensorrt-rtx"):
            get("tensorrt-rtx").build(file, own)
