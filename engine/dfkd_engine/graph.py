"""A function of tensors, forward or gradient, as one graph of plain ATen operations with a dynamic batch.

torch.export cannot follow a call of autograd.grad; make_fx records what it does, operation by operation, with the
batch as a symbol. Backward operations are taken apart into the forward operations they are (decompositions), so the
result is an ordinary network that any backend compiles.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from dfkd_engine import rewrites
from dfkd_engine.decompositions import table
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import DTYPES, TensorSpec
from dfkd_engine.tracing.interception import Interception
from dfkd_engine.tracing.module_paths import ModulePaths, networks_of
from dfkd_engine.tracing.operations import ALLOWED

Function = Callable[..., Tensor | tuple[Tensor, ...]]

_ROWS = 6  # to trace with; any number above 1 gives the same graph


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced function: plain operations, weights as constants, no gradient left to take.

    module: an FX graph module; its forward takes the inputs in order and returns a tuple of the outputs. Constants are
    its buffers, named after the parameters they come from; node.meta["module"] is the layer an operation comes from.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run it with eager PyTorch, at any batch."""
        result: tuple[Tensor, ...] = self.module(*tensors)
        return result


def trace(
    function: Function,
    inputs: Sequence[TensorSpec],
    *,
    output_names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    also: Collection[Any] = (),
) -> Graph:
    """Trace a function of tensors into a graph.

    function: takes tensors like `inputs`, in order, and returns one tensor or a tuple of them. It may call
        torch.autograd.grad for the gradient in a detached copy of an input. Networks are in evaluation mode.
    inputs: shapes with None for the batch; one batch for all, of 2 or more rows. Other sizes are fixed.
    output_names: by default "output", or "output_0", "output_1", ...
    device: where the networks are.
    also: operations beside the plain ones that may stand in the graph, such as `group_norms.KERNELS`: only backends
        that run them in this process can take it then.

    What depends on weights alone is worked out now, such as a flipped kernel, so a graph does not follow weights that
    change afterwards. A function that takes another way for more rows (an `if` on the batch) is traced as it goes with
    a few.

    Raises:
        EngineError: an operation that no plain ones stand for, with the layer it comes from; a result that depends on
            values for its shape; a batch that is not free; a gradient of weights; float64.
    """
    networks = networks_of(function)
    paths = ModulePaths(networks)
    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    fake = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    examples = [_example(spec, fake, torch.device(device)) for spec in inputs]
    names: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        with paths.watching(), Interception():
            result = function(*tensors)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        names.extend(_output_names(output_names, results))
        return results

    # without the Python dispatcher the batch becomes a number
    with torch.no_grad(), fake, enable_python_dispatcher():
        tracer = make_fx(flat, decomposition_table=table(), tracing_mode="real", _allow_non_fake_inputs=True)
        try:
            module = tracer(*examples)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            what = rewrites.describe_operation(error.func, paths.failed)
            raise EngineError(what, "its result depends on values, not on shapes", "Compute it with masks") from error
        except GuardOnDataDependentSymNode as error:
            why = "a graph takes one way for all values"
            raise EngineError(f"{paths.failed or 'the function'} decides by a value", why, "Use a mask") from error
    rewrites.simplify(module)
    rewrites.name_constants(module, networks)
    _check(module, inputs, examples, env, ALLOWED | set(also))
    outputs = tuple(_spec(*pair, examples) for pair in zip(names, _results(module), strict=True))
    return Graph(_finished(module, inputs), tuple(inputs), outputs)


def _example(spec: TensorSpec, fake: FakeTensorMode, device: torch.device) -> Tensor:
    """A tensor without content whose batch is a symbol, the same one for all inputs."""
    dims = [DimDynamic.DUCK if size is None else DimDynamic.STATIC for size in spec.shape]
    real = torch.empty(spec.sizes(_ROWS), dtype=getattr(torch, spec.dtype), device=device)
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims)
    return fake.from_tensor(real, symbolic_context=context, source=ConstantSource(spec.name))


def _output_names(names: Sequence[str] | None, results: Sequence[Tensor]) -> list[str]:
    if names is None:
        return ["output"] if len(results) == 1 else [f"output_{index}" for index in range(len(results))]
    if len(names) != len(results):
        why = f"{len(names)} are named: {', '.join(names)}"
        raise EngineError(f"the function returns {len(results)} tensors", why, "Name each of them")
    return list(names)


def _results(module: fx.GraphModule) -> list[Any]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.args[0]]


def _spec(name: str, value: Tensor, examples: Sequence[Tensor]) -> TensorSpec:
    batches = {str(x.shape[0]) for x in examples if x.dim() and isinstance(x.shape[0], torch.SymInt)}
    shape = [None if str(size) in batches else size for size in value.shape]
    if any(isinstance(size, torch.SymInt) for size in shape) or None in shape[1:]:
        why = "the batch may only be a result's first size, alone"
        raise EngineError(f"the result {name!r} has the shape {list(value.shape)}", why, "Reshape the result")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise EngineError(f"the result {name!r} is {dtype}", f"a graph gives {', '.join(DTYPES)}", "Cast it")
    return TensorSpec(name, tuple(None if size is None else int(size) for size in shape), dtype)


def _check(
    module: fx.GraphModule,
    inputs: Sequence[TensorSpec],
    examples: Sequence[Tensor],
    env: ShapeEnv,
    allowed: Collection[Any],
) -> None:
    """Raises EngineError: an operation that is not plain, float64, or a batch that tracing turned into a number."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target not in allowed:
            why = "a graph holds plain operations only, and no decomposition is known for it"
            todo = "Write the layer with other operations, or add a decomposition in dfkd_engine.decompositions"
            raise EngineError(rewrites.describe(node), why, todo)
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            why = "float64 is not computed in a graph"
            raise EngineError(f"{rewrites.describe(node)} gives float64", why, "Cast to float32 before it")
    for spec, example in zip(inputs, examples, strict=True):
        if spec.batched and not _is_free(example.shape[0]):
            place = next((str(guard.sloc) for guard in env.guards if guard.expr.is_Equality), "an unknown place")
            todo = "Take it as tensor.shape[0], which len(tensor) does not, and compare it with nothing"
            raise EngineError(f"the batch of {spec.name!r} is not free", f"it became a number in {place}", todo)


def _is_free(size: Any) -> bool:
    """True if a symbolic size still stands for any number."""
    return isinstance(size, torch.SymInt) and bool(size.node.shape_env.replace(size.node.expr).is_symbol)


def _finished(module: fx.GraphModule, inputs: Sequence[TensorSpec]) -> fx.GraphModule:
    """A copy whose inputs have their names, and whose nodes keep their layer and nothing else of tracing."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, spec in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        copies[node] = graph.placeholder(spec.name)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {"module": node.meta.get("custom", {}).get("module", "")}
    graph.lint()
    return fx.GraphModule(module, graph, class_name="Graph")
