"""ONNX files of graphs: right names, a dynamic batch, and the same values in ONNX Runtime."""

from functools import cache

import pytest
import torch
from torch import nn

from dfkd_engine.errors import EngineError
from dfkd_engine.export import to_onnx, to_program
from dfkd_engine.graph import trace
from dfkd_engine.spec import TensorSpec
from tests.engine.small_functions import (
    Attention,
    PixelGradient,
    ValueAndGradient,
    errors,
    examples,
    frozen,
    images,
    teacher,
)
from tests.engine.test_graph import Decode, spec, unet_graph, vae

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BATCHES = (2, 3, 7)


@cache
def vjp():
    specs = (spec(4, 3, 4, name="z"),)
    return trace(ValueAndGradient(Decode(vae("kl"))), specs, output_names=("image", "gradient"))


@cache
def guidance():
    size, network = teacher("resnet_basic")  # max-pooling and strided convolutions
    return trace(PixelGradient(network, size, bn=True), images(size), output_names=("gradient", "cls", "bn"))


@cache
def attention():
    torch.manual_seed(0)
    network = frozen(nn.Sequential(Attention(), nn.LayerNorm(8)))
    return trace(ValueAndGradient(network), [spec(5, 8)], output_names=("y", "gradient"))


GRAPHS = {"vjp": vjp, "guidance": guidance, "unet": unet_graph, "attention": attention}


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", GRAPHS)
def test_onnx_runtime_gives_the_same(name, tmp_path):
    graph = GRAPHS[name]()
    path = tmp_path / "model.onnx"
    to_onnx(graph, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == [tensor.name for tensor in graph.inputs]
    assert [value.name for value in model.graph.output] == [tensor.name for tensor in graph.outputs]
    # TensorRT's parser refuses the indices of a max-pooling, and scatters are slow everywhere
    assert all(len(node.output) == 1 for node in model.graph.node if node.op_type == "MaxPool")
    assert not {node.op_type for node in model.graph.node} & {"ScatterElements", "ScatterND"}
    run = session(path)
    for batch in BATCHES:
        inputs = examples(graph.inputs, batch, seed=batch)
        feeds = {tensor.name: value.numpy() for tensor, value in zip(graph.inputs, inputs, strict=True)}
        for got, want in zip(run.run(None, feeds), graph(*inputs), strict=True):
            assert errors(torch.from_numpy(got), want).max() <= 2e-5


def test_programs_take_any_batch():
    program = to_program(attention())
    for batch in BATCHES:
        (x,) = examples(attention().inputs, batch)
        for got, want in zip(program.module()(x), attention()(x), strict=True):
            torch.testing.assert_close(got, want)


def test_large_weights_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr("dfkd_engine.export._LARGEST_FILE", 100)
    path = tmp_path / "model.onnx"
    to_onnx(attention(), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    (x,) = examples(attention().inputs, 3)
    assert errors(torch.from_numpy(session(path).run(None, {"x": x.numpy()})[0]), attention()(x)[0]).max() <= 2e-5


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(EngineError, match=r"no/model\.onnx could not be written"):
        to_onnx(attention(), tmp_path / "no" / "model.onnx")


def test_names_may_be_those_of_operations(tmp_path):
    specs = (spec(3, name="mul"), spec(3, name="t"))
    layer = nn.Linear(3, 3).requires_grad_(False)
    graph = trace(lambda mul, t: (layer(t) * mul, t + mul), specs, output_names=("add", "layer_weight"))
    to_onnx(graph, tmp_path / "model.onnx")
    inputs = examples(specs, 4)
    feeds = {tensor.name: value.numpy() for tensor, value in zip(specs, inputs, strict=True)}
    run = session(tmp_path / "model.onnx")
    assert [value.name for value in run.get_outputs()] == ["add", "layer_weight"]
    for got, want in zip(run.run(None, feeds), graph(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want)


def test_unused_and_fixed_inputs_keep_their_names(tmp_path):
    specs = (spec(3), TensorSpec("scale", (3,), "float32"), spec(name="unused", dtype="int64"))
    graph = trace(lambda x, scale, unused: x * scale, specs)
    to_onnx(graph, tmp_path / "model.onnx")
    inputs = examples(specs, 4)
    feeds = {tensor.name: value.numpy() for tensor, value in zip(specs, inputs, strict=True)}
    run = session(tmp_path / "model.onnx")
    assert [value.name for value in run.get_inputs()] == ["x", "scale", "unused"]
    torch.testing.assert_close(torch.from_numpy(run.run(None, feeds)[0]), inputs[0] * inputs[1])
