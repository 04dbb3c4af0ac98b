"""Stable Diffusion 1.5's sizes, and a rehearsal of what its engines cost with few channels."""

import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import fx

from benchmarks import sd15, sd15_engines
from benchmarks.machine import describe
from dfkd_engine.backends import get
from dfkd_engine.devices import family
from dfkd_engine.errors import EngineError
from tests.engine import small_graphs


def parameters(network):
    return sum(weight.numel() for weight in network.parameters())


def test_the_sizes_are_the_published_ones():
    """By the number of weights that runwayml/stable-diffusion-v1-5 and torchvision's resnet34 have."""
    with torch.device("meta"):
        assert parameters(UNet2DConditionModel(**sd15.UNET)) == 859_520_964
        assert parameters(AutoencoderKL(**sd15.VAE)) == 83_653_863
    teacher = sd15.make_teacher()
    assert parameters(teacher.module) == 21_797_672
    assert len(teacher.batch_norms()) == 36 and teacher.input_size == 224


def test_random_weights_keep_half_precision_finite():
    prior, teacher = sd15.make_prior(64, thin=True), sd15.make_teacher(thin=True)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = prior.vae.decode(z.half()).sample
        predicted = prior.denoise(z, torch.tensor([500.0]), *prior.conditions(["a photo", ""]))
        logits = teacher.logits(prior.decode(z))
    for result in (decoded, predicted, logits):
        assert result.isfinite().all() and 0.01 < result.float().std() < 100
    assert decoded.dtype == torch.float16 and logits.dtype == torch.float32
    weights, again, other = (sd15.make_prior(64, thin=True, seed=s).vae.state_dict() for s in (0, 0, 9))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["decoder.conv_in.weight"], other["decoder.conv_in.weight"])


def test_both_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("DFKD_TENSORRT_WORKSPACE_GIB", "")  # which a stage sets
    row = {name: value for found in sd15_engines.export("decode", 64, tmp_path, True) for name, value in found.items()}
    assert row["backward_operations"] == [] and row["nodes"] > 300 and row["onnx_bytes"] > row["weight_bytes"] > 1e6
    if (why := get("tensorrt-rtx").unusable(family(sd15_engines.TARGETS), "float16")) is not None:
        pytest.skip(f"no plan: {why}")
    (made,) = sd15_engines.build(2, tmp_path)
    assert made["plan_bytes"] > row["weight_bytes"] and made["build_seconds"] > 0


def test_a_process_that_takes_too_long_or_fails_is_a_row():
    *_, row = sd15_engines.measure("decode", 64, [2], True, 0.2)
    assert row == {"network": "decode", "size": 64, "rows": 2, "failure": "stopped after 0.2 s"}
    assert list(sd15_engines.run_child(["--no-such-option"], 60)) == [{"failure": "ended with status 2"}]


def test_an_exception_is_a_row_and_keeps_what_came_before(capsys):
    def stage():
        yield {"trace_seconds": 3}
        raise ValueError("no room\nand more")

    sd15_engines.child(stage(), "export_memory_bytes")
    before, after = capsys.readouterr().out.splitlines()
    assert (
        before.startswith('{"trace_seconds": 3, "export_memory_bytes": ')
        and after == '{"failure": "ValueError: no room"}'
    )


def test_the_workspace_grows_until_it_is_enough(monkeypatch, tmp_path):
    """What is refused for another reason is not tried again."""
    spec = small_graphs.spec("decode", "tensorrt-rtx", family(sd15_engines.TARGETS))
    (tmp_path / sd15_engines.SPEC).write_text(json.dumps(spec.to_json()))
    asked = []

    def refuse(model, spec, needed=12, why="Error Code 2: OutOfMemory"):
        asked.append((int(os.environ["DFKD_TENSORRT_WORKSPACE_GIB"]), spec.rows))
        if asked[-1][0] < needed:
            raise EngineError("decode cannot be compiled", why, "use another")
        return memoryview(b"plan")

    monkeypatch.setenv("DFKD_TENSORRT_WORKSPACE_GIB", "")
    monkeypatch.setattr(sd15_engines.TENSORRT_RTX, "build", refuse)
    *before, last = sd15_engines.build(16, tmp_path)
    assert asked == [(gib, (1, 16, 16)) for gib in (4, 8, 12)]
    assert [row["too_small_workspace_gib"] for row in before] == [4, 8]
    assert (last["workspace_gib"], last["plan_bytes"]) == (12, 4)
    assert sd15_engines.workspace(before[-1] | last) == "12 (not 8)"
    for other in (partial(refuse, why="no such operation"), partial(refuse, needed=1000)):
        asked.clear()
        monkeypatch.setattr(sd15_engines.TENSORRT_RTX, "build", other)
        with pytest.raises(EngineError, match="cannot be compiled"):
            list(sd15_engines.build(2, tmp_path))
        assert len(asked) == (1 if other.keywords.get("why") else len(sd15_engines.WORKSPACES))


def test_backward_operations_are_found():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.sigmoid_backward.default, (x, x)))
    found = sd15_engines.backward_operations(SimpleNamespace(module=fx.GraphModule({}, graph)))
    assert found == ["aten.sigmoid_backward.default"]


def test_rows_replace_their_earlier_ones_and_the_table_says_what_failed():
    one = {"network": "unet", "size": 512, "rows": 2, "trace_seconds": 60.0, "nodes": 3000, "backward_operations": []}
    rows = sd15_engines.merged([one], {"network": "decode", "size": 256, "rows": 2, "trace_seconds": 5.0})
    rows = sd15_engines.merged(
        rows, one | {"plan_bytes": 2_000_000_000, "workspace_gib": 8, "failure": "killed, as where memory runs out"}
    )
    assert len(rows) == 2
    found = {"rows": rows, "machine": describe(torch.device("cpu")), "versions": {"tensorrt-rtx": "1.7"}}
    lines = sd15_engines.markdown(found).splitlines()
    assert lines[2] == "| unet | 512x512 | 2 | 60 | 3000 | 0 | - | - | - | - | 2.00 | - | 8 |"
    assert lines[3] == "| decode | 256x256 | 2 | 5 | - | - | - | - | - | - | - | - | - |"
    assert lines[-1] == "- unet, 2 rows: killed, as where memory runs out"
