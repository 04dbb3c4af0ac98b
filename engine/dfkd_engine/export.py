"""A graph as a torch.export program, and as an ONNX file."""

import ast
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph
from dfkd_engine.quantise import is_quantised, translations

OPSET = 18
QUANTISED_OPSET = 19  # of a graph with 8-bit constants: the first that has float8, and scales in half precision
# protobuf holds 2 GiB at most; weights go to a file of their own before that
_LARGEST_FILE = 1_500_000_000


def to_program(graph: Graph, planned: int = 6, largest: int | None = None, by_layer: bool = False) -> ExportedProgram:
    """The graph as a torch.export program with a dynamic batch of 2 or more rows, one argument per input.

    planned: rows of the examples to export with: a compiler's hint for choices of speed, no limit.
    largest: rows of a call at most; None: any.
    by_layer: every node's "nn_module_stack" names the place of its layer in `layers_of`.
    Raises EngineError where torch.export refuses it.
    """
    batch, most = max(planned, 2), None if largest is None else max(largest, 3)
    size = Dim("batch", min=2, max=most)
    shapes = tuple({0: size} if spec.shape[:1] == (None,) else None for spec in graph.inputs)
    device = next((value.device for value in graph.module.buffers()), torch.device("cpu"))
    examples = tuple(
        torch.zeros([batch if n is None else n for n in spec.shape], dtype=getattr(torch, spec.dtype), device=device)
        for spec in graph.inputs
    )
    named = _ByLayer(graph) if by_layer else _Named(graph)
    try:
        with torch.no_grad():
            return torch.export.export(named, examples, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch.export documents no exceptions of its own
        raise EngineError("the graph could not be exported", _first_line(error), "Report it with the graph") from error


def to_onnx(graph: Graph, path: Path) -> None:
    """Write path, an ONNX model with the specs' names and a dynamic batch; weights above 1.5 GB lie beside it.

    The metadata of every node say which layer it comes from ("module") and which operation of the graph it is a part of
    ("operation"); nothing else is kept of the exporter's own, which names files of this machine.

    Raises EngineError: the export failed, or onnx and onnxscript are not installed.
    """
    program, narrow = to_program(graph, by_layer=True), is_quantised(graph)
    try:
        with quiet():
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=QUANTISED_OPSET if narrow else OPSET,
                verbose=False,
                custom_translation_table=translations() if narrow else None,
            )
    except ImportError as error:
        raise EngineError("no ONNX file can be written", _first_line(error), 'pip install "dfkd[onnx]"') from error
    except torch.onnx.errors.OnnxExporterError as error:
        raise EngineError("the graph could not be exported", _first_line(error), "Use another backend") from error
    assert model is not None
    _describe_nodes(model.model.graph, layers_of(graph))
    _rename(model.model.graph, [spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs])
    size = sum(value.numel() * value.element_size() for value in graph.module.buffers())
    try:
        model.save(path, external_data=size > _LARGEST_FILE)
    except OSError as error:
        raise EngineError(f"{path} could not be written", str(error), "Make room, or choose another folder") from error


class _Named(nn.Module):
    """The graph as torch.export wants a module: one argument per input."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module = graph.module

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.module(*tensors)
        return result


def layers_of(graph: Graph) -> list[str]:
    """The layers that the graph's operations come from, sorted; "" for what lies outside of all."""
    return sorted({node.meta.get("module", "") for node in graph.module.graph.nodes if node.op == "call_function"})


class _ByLayer(nn.Module):
    """The graph with each operation called by a module of its layer.

    torch.export and the ONNX exporter keep nothing of a node's origin but the stack of modules it was called in.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.module = graph.module
        self.layers = nn.ModuleList(_Layer() for _ in layers_of(graph))
        self._places = {path: place for place, path in enumerate(layers_of(graph))}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _Interpreter(self.module, self.call).run(*tensors)
        return result

    def call(self, node: fx.Node, run: Callable[[], Any]) -> Any:
        return self.layers[self._places[node.meta.get("module", "")]](run)


class _Layer(nn.Module):
    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, call: Callable[[fx.Node, Callable[[], Any]], Any]) -> None:
        super().__init__(module)
        self._call = call

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        return self._call(n, partial(super().run_node, n))


def _describe_nodes(onnx_graph: Any, layers: Sequence[str]) -> None:
    for node in onnx_graph:
        stack = node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "[]")
        names = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        place = re.search(r"'layers\.(\d+)'", names)
        node.metadata_props.clear()
        node.metadata_props["module"] = layers[int(place[1])] if place else ""
        node.metadata_props["operation"] = ast.literal_eval(stack)[-1] if stack != "[]" else ""


def _rename(onnx_graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs of an onnx_ir graph their names, and another one to what has such a name by chance."""
    ends = [*onnx_graph.inputs, *onnx_graph.outputs]
    values = [value for node in onnx_graph for value in node.outputs]
    for value in [*onnx_graph.initializers.values(), *values]:
        if value.name in {*inputs, *outputs}:
            value.name = f"{value.name}_inside"
    # by way of names that no one has: an input may be called as another one was
    for index, value in enumerate(ends):
        value.name = f"end_{index}_of_the_graph"
    for value, name in zip(ends, [*inputs, *outputs], strict=True):
        value.name = name


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(".: ")
