"""Launches timed in turns: a compiled way is compiled for every shape, and rows are told as they come."""

import json
from argparse import Namespace
from functools import partial

import torch

from benchmarks.bandwidth import Launch, bench, report


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
            call = partial(torch.compile(function, dynamic=False, backend=backend), torch.ones(size))
            yield Launch({"size": size}, size, lambda device, call=call: {"compile": call})

    sizes = range(2, torch._dynamo.config.recompile_limit + 4)
    result = bench(launches(), 1, torch.device("cpu"), rehearse=True)
    assert compiled == [(size,) for size in sizes] and not result["failures"]


def test_a_line_of_json_follows_every_launch(capsys):
    """Who stops it reads the last one, a whole result of what was measured until then."""
    options = Namespace(rehearse=True, record=False, resources=False, repeats=1)
    launches = [Launch({"size": size}, size, lambda device: {"eager": torch.ones(2).relu}) for size in (2, 3)]
    report("fake", launches, options)
    one, two, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["size"] for row in one["rows"]] == [2] and [row["size"] for row in two["rows"]] == [2, 3]
    assert two == last and one.keys() == last.keys() and one["copy_bytes_per_second"] > 0
