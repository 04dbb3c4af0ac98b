"""A whole step as one CUDA graph: launched by the driver at once instead of kernel by kernel from Python.

Recipe: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dfkd.training.settings import DistillSettings
from dfkd.errors import UsageError

WARM_UP = 3  # real steps on a stream of their own, in which libraries choose algorithms and allocate

Descent = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def check_cuda_graph(settings: DistillSettings, device: torch.device, processes: int) -> None:
    """Raise UsageError where a step cannot be captured."""
    if not settings.cuda_graph:
        return
    whys = (
        (device.type != "cuda", f"on {device.type}", "CUDA graphs are for GPUs", "leave it out"),
        (processes > 1, f"with {processes} processes", "gradients that travel are not captured", "leave it out"),
        (settings.amp == "fp16", "with --amp fp16", "its scale is decided from step to step", "use --amp bf16"),
        (
            settings.compile not in ("off", "default"),
            f"with --compile {settings.compile}",
            "that one makes graphs of its own or times kernels while it is captured",
            "use --compile default",
        ),
    )
    for true, where, why, todo in whys:
        if true:
            raise UsageError(f"--cuda-graph {where}", why, todo)


class Captured:
    """``descent`` of (images, labels, the teacher's logits or None) -> loss, for batches of ``rows`` images.

    The first WARM_UP batches run as they are, the next is captured, and from then on copies of the tensors go in and a
    copy of the loss comes out. Batches of other sizes run as they are. What changes from step to step has to be read
    from the device (the learning rate) or from torch's generator (dropout).
    """

    def __init__(self, descent: Descent, rows: int) -> None:
        self._descent, self._rows = descent, rows
        self._warm = 0
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor | None, ...] = ()
        self._loss: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        if len(images) != self._rows:
            return self._descent(images, labels, wanted)
        if self._warm < WARM_UP:
            self._warm += 1
            return self._apart(images, labels, wanted)
        if self._graph is None:
            self._capture(images, labels, wanted)
        for mine, given in zip(self._inputs, (images, labels, wanted), strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        assert self._graph is not None and self._loss is not None
        self._graph.replay()
        return self._loss.clone()

    def _apart(self, images: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._descent(images, labels, wanted)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, images: Tensor, labels: Tensor, wanted: Tensor | None) -> None:
        self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in (images, labels, wanted))
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may allocate and copy meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._descent(*self._inputs)  # type: ignore[arg-type]
