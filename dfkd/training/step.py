"""One training step: a loss, its gradient, SGD; compiled, captured or shared between processes as asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.config import TrainConfig
from dfkd.errors import UsageError
from dfkd.logs import check_logs
from dfkd.training.losses import Network
from dfkd.training.state import State
from dfkd.training.world import World
from dfkd_engine.backends import get
from dfkd_engine.backends.inductor import quiet
from dfkd_engine.errors import compiler_line

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRAPHS = ("reduce-overhead", "max-autotune")  # the modes of torch.compile that replay CUDA graphs on a GPU
WARM_UP = 3  # real steps on a stream of their own, in which libraries choose algorithms and allocate

Loss = Callable[[Network, Tensor, Tensor], Tensor]


def check_training(config: TrainConfig, world: World) -> None:
    """Raise UsageError for what cannot work on the device, with so many processes, or without a package.

    With --compile a small function is compiled, which finds a compiler that does not work; seconds, once a process.
    """
    compute, device, kind = config.compute, world.device, world.device.type
    if compute.amp == "fp16" and kind == "cpu":
        raise UsageError("--amp fp16 on a CPU", "float16 is for GPUs", "use --amp bf16 or --amp off")
    if config.batch_size < world.size:
        raise UsageError(
            f"--batch-size {config.batch_size} with {world.size} processes",
            "it is of all processes together, and each needs an image",
            "raise it, or start fewer processes",
        )
    if compute.sync_bn == "on" and world.size > 1 and kind != "cuda":
        raise UsageError(
            f"--sync-bn on on {kind}",
            "torch's SyncBatchNorm is for GPUs",
            "use --sync-bn off: each process then takes the statistics of its part of the batch",
        )
    if compute.compile != "off" and (why := get("inductor").unusable(device)) is not None:
        raise UsageError(f"--compile {compute.compile}", why, "install it, or use --compile off")
    if compute.compile == "reduce-overhead" and kind != "cuda":
        raise UsageError(f"--compile {compute.compile} on {kind}", "it replays CUDA graphs", "use --compile default")
    whys = (
        (kind != "cuda", f"on {kind}", "CUDA graphs are for GPUs", "leave it out"),
        (world.size > 1, f"with {world.size} processes", "gradients that travel are not captured", "leave it out"),
        (compute.amp == "fp16", "with --amp fp16", "its scale is decided from step to step", "use --amp bf16"),
        (
            compute.compile not in ("off", "default"),
            f"with --compile {compute.compile}",
            "that one makes graphs of its own or times kernels while it is captured",
            "use --compile default",
        ),
    )
    for true, where, why, todo in whys:
        if compute.cuda_graph and true:
            raise UsageError(f"--cuda-graph {where}", why, todo)
    check_logs(config.logging)
    if compute.compile != "off":
        try_compiler(compute.compile, device)


def autocast(amp: str, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context in which networks compute under --amp."""
    return partial(torch.autocast, device.type, AMP_DTYPES[amp], enabled=amp != "off")


class Step:
    """Trains on a batch of this process, all of which have one size.

    loss: of (the network as it is called in training, images, labels), a scalar on its graph.
    unused: whether some parameters of the network get no gradient.
    """

    def __init__(self, loss: Loss, state: State, config: TrainConfig, world: World, unused: bool = False) -> None:
        self._loss, self._state, self._mode = loss, state, config.compute.compile
        self._network = compiled(world.shared(state.network, unused), self._mode)
        self._share = 1.0
        self._descent = Captured(self._descend) if config.compute.cuda_graph else self._descend

    def __call__(self, images: Tensor, labels: Tensor, lr: float, share: float = 1.0) -> Tensor:
        """The batch's loss, a scalar on the device, times `share`: 1 where all processes have as many images."""
        self._state.set_rate(lr)
        self._share = share
        if self._mode in GRAPHS:
            # What one network answered is to outlive the call of another.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss = self._descent(images, labels)
        self._state.advance()
        return loss

    def _descend(self, images: Tensor, labels: Tensor) -> Tensor:
        with compiling(self._mode):  # the backward pass is compiled when it is first taken
            loss = self._loss(self._network, images, labels)
            if self._share != 1:
                loss = self._share * loss
            self._state.descend(loss)
            return loss.detach()


def compiled(network: nn.Module, mode: str) -> Network:
    """The network, compiled when it is first called unless mode is "off".

    Random layers draw as the network itself would, so results differ by rounding alone.
    Its first call raises UsageError where the compiler cannot take the network.
    """
    if mode == "off":
        return network
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    fast = torch.compile(network, dynamic=False, options=options)

    def call(*inputs: Tensor) -> Tensor:
        with compiling(mode):
            return fast(*inputs)  # type: ignore[no-any-return]

    return call


@contextmanager
def compiling(mode: str) -> Iterator[None]:
    """Turn what torch's compiler raises inside into a UsageError of one line, in the words of whoever refused."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        why = compiler_line(error)
        raise UsageError(f"--compile {mode} cannot take the network", why, "use --compile off") from error


@cache
def try_compiler(mode: str, device: torch.device) -> None:
    """Compile a few sums with their gradient on the device, from nothing. Raises UsageError where that fails."""

    def curve(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    x = torch.ones(8, device=device, requires_grad=True)
    try:
        with (
            quiet(),
            torch._inductor.config.patch(force_disable_caches=True),
        ):  # what was compiled before proves nothing now
            torch.autograd.grad(torch.compile(curve, dynamic=False)(x), x)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UsageError(f"--compile {mode} cannot work here", compiler_line(error), "use --compile off") from error


class Captured:
    """A whole step as one CUDA graph: launched by the driver at once instead of kernel by kernel from Python.

    The first WARM_UP batches run as they are, the next is captured, and from then on copies of the tensors go in and a
    copy of the loss comes out. What changes from step to step has to be read from the device (the learning rate) or
    from torch's generator (dropout).
    Recipe: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    """

    def __init__(self, descent: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._descent, self._warm = descent, 0
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._loss: Any = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._warm < WARM_UP:
            self._warm += 1
            return self._apart(images, labels)
        if self._graph is None:
            self._capture(images, labels)
        for mine, given in zip(self._inputs, (images, labels), strict=True):
            mine.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        loss: Tensor = self._loss.clone()
        return loss

    def _apart(self, images: Tensor, labels: Tensor) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._descent(images, labels)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self._inputs = (images.clone(), labels.clone())
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may allocate and copy meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._descent(*self._inputs)
