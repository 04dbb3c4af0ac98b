"""Launches timed in turns: a compiled way is compiled for every shape."""

from functools import partial

import torch

from benchmarks.bandwidth import Launch, bench


def test_a_compiled_way_is_compiled_for_more_shapes_than_torch_keeps():
    """Past its limit torch.compile would run the function itself, and the row would show eager's time."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(tuple(inputs[0].shape))
        return graph

    def function(x):
        return x.relu() + 1

    def launches():
        for size in sizes:
            call = torch.compile(function, dynamic=False, backend=backend)
            yield Launch({"size": size}, size, {"compile": partial(call, torch.ones(size))})

    sizes = range(2, torch._dynamo.config.recompile_limit + 4)
    result = bench(launches(), 1, torch.device("cpu"), rehearse=True)
    assert compiled == [(size,) for size in sizes] and not result["failures"]
