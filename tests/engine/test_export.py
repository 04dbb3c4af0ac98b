"""ONNX files of graphs: right names, a dynamic batch, and the same values in ONNX Runtime."""

from functools import cache

import pytest
import torch
from torch import nn

from dfkd_engine.errors import EngineError
from dfkd_engine.export import to_onnx, to_program
from dfkd_engine.graph import trace
from dfkd_engine.spec import TensorSpec
from tests.engine import small_graphs
from tests.engine.small_functions import Attention, ValueAndGradient, errors, examples, frozen

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BATCHES = (2, 7)


def spec(*shape, name="x", dtype="float32"):
    return TensorSpec(name, (None, *shape), dtype)


@cache
def attention():
    torch.manual_seed(0)
    network = frozen(nn.Sequential(Attention(), nn.LayerNorm(8)))
    return trace(ValueAndGradient(network), [spec(5, 8)], output_names=("y", "gradient"))


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path, graph, inputs):
    feeds = {tensor.name: value.numpy() for tensor, value in zip(graph.inputs, inputs, strict=True)}
    return [torch.from_numpy(result) for result in session(path).run(None, feeds)]


@pytest.mark.parametrize("network", ["unet", "gradient"])
def test_onnx_runtime_gives_the_same(network, models):
    graph, path = small_graphs.graph(network), models(network)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == [tensor.name for tensor in graph.inputs]
    assert [value.name for value in model.graph.output] == [tensor.name for tensor in graph.outputs]
    # TensorRT's parser refuses the indices of a max-pooling, and scatters are slow everywhere
    assert all(len(node.output) == 1 for node in model.graph.node if node.op_type == "MaxPool")
    assert not {node.op_type for node in model.graph.node} & {"ScatterElements", "ScatterND"}
    # every node says which layer it comes from, and no file of this machine is named
    layers = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "module"}
    assert any("conv" in layer or "first" in layer for layer in layers) and b".py" not in model.SerializeToString()
    for batch in BATCHES:
        inputs = small_graphs.arguments(network, batch)
        for got, want in zip(run(path, graph, inputs), graph(*inputs), strict=True):
            assert errors(got, want).max() <= 2e-5


def test_layer_norms_programs_and_weights_beside(tmp_path, monkeypatch):
    program = to_program(attention())
    monkeypatch.setattr("dfkd_engine.export._LARGEST_FILE", 100)
    to_onnx(attention(), tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    for batch in BATCHES:
        (x,) = examples(attention().inputs, batch)
        of_onnx, of_program = run(tmp_path / "model.onnx", attention(), [x]), program.module()(x)
        for got, other, want in zip(of_onnx, of_program, attention()(x), strict=True):
            assert errors(got, want).max() <= 2e-5
            torch.testing.assert_close(other, want)
    with pytest.raises(EngineError, match=r"no/model\.onnx could not be written"):
        to_onnx(attention(), tmp_path / "no" / "model.onnx")


def test_names_of_operations_and_unused_or_fixed_inputs(tmp_path):
    specs = (spec(3, name="mul"), TensorSpec("t", (3,), "float32"), spec(name="unused", dtype="int64"))
    layer = nn.Linear(3, 3).requires_grad_(False)
    names = ("add", "layer_weight")
    graph = trace(lambda mul, t, unused: (layer(mul) * t, t + mul), specs, output_names=names)
    to_onnx(graph, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx")
    assert [value.name for value in opened.get_inputs()] == ["mul", "t", "unused"]
    assert tuple(value.name for value in opened.get_outputs()) == names
    inputs = examples(specs, 4)
    for got, want in zip(run(tmp_path / "model.onnx", graph, inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(got, want)
