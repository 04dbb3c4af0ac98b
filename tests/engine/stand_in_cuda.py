"""torch.cuda without a GPU: streams and graphs that note what is done in which order, for plans of the stand-in."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import ClassVar

import torch

from dfkd_engine.backends import tensorrt_run
from dfkd_engine.backends.tensorrt import TensorRT
from tests.engine import stand_in_tensorrt as stand_in

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


class StandIn(TensorRT):
    """The backend over a stand-in library, whose device is the CPU."""

    def __init__(self, library, rtx=False):
        super().__init__("tensorrt-rtx" if rtx else "tensorrt", "no_module", "10.15", "12", TARGETS if rtx else ())
        self._library = library

    def library(self):
        return self._library

    def unusable(self, device, dtype="float32"):
        return None


class Stream:
    """torch.cuda.Stream, whose waits are noted among what the library's stand-in did."""

    events: ClassVar[list] = []
    made: ClassVar[int] = 0

    def __init__(self, device=None, handle=None):
        Stream.made += 1
        self.cuda_stream = 100 + Stream.made if handle is None else handle

    def wait_stream(self, other):
        self.events.append(("wait", self.cuda_stream, other.cuda_stream))


class Graph:
    """torch.cuda.CUDAGraph: what the library was told to run while it was captured is run again by a replay."""

    replays = 0

    def __init__(self):
        self.launches = []

    def replay(self):
        Graph.replays += 1
        for launch in self.launches:
            launch()


def fake_cuda(monkeypatch, cache):
    """torch.cuda as far as plans need it: `stream` of the result is the current one, 0 the default; cache: a folder."""
    control = SimpleNamespace(stream=0, library=None, synchronised=0)

    @contextmanager
    def capture(graph):
        before, kept = control.stream, len(control.library.captured)
        control.stream = 55
        yield
        control.stream = before
        graph.launches = control.library.captured[kept:]

    def synchronize(device=None):
        control.synchronised += 1

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(handle=control.stream))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(tensorrt_run, "_ALIGNMENT", stand_in.ALIGNMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(Graph, "replays", 0)
    return control
