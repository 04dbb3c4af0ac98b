"""dfkd-generate's plan, printed before or alone; smaller calls after an out-of-memory error, and remembered."""

import json

import pytest
import torch

from dfkd.cli import generate
from dfkd.synthesis.planning import seconds
from dfkd.synthesis.planning.remembered import REMEMBERED
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.run import Synthesis
from dfkd_engine.networks import Prior
from tests.cli.small_generate import images_of, last_line, shards_of

GROUP = ("--count", 40, "--group", 40, "--batch", 512, "--shard-size", 40, "--seed", 3)


@pytest.fixture
def engines(tmp_path):
    return "--engines", tmp_path / "engines"


def tight(monkeypatch, owner, name, most, rows_of=len, failures=None):
    """Let calls of `owner.name` with more than `most` rows run out of memory."""
    real = getattr(owner, name)

    def short(self, x, *rest, **named):
        if SAMPLING and rows_of(x) > most:
            (failures if failures is not None else []).append(rows_of(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, x, *rest, **named)

    monkeypatch.setattr(owner, name, short)


SAMPLING = []  # filled while a group is sampled


@pytest.fixture(autouse=True)
def sampling(monkeypatch):
    """Memory is short while a group is sampled, not where calls are measured and tried before."""
    real = Synthesis.sample

    def sample(self, *arguments):
        SAMPLING.append(True)
        try:
            return real(self, *arguments)
        finally:
            SAMPLING.clear()

    monkeypatch.setattr(Synthesis, "sample", sample)


def test_plan_only_writes_nothing(call, engines, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("--out", out, *GROUP, "--batch", 16, "--micro-batch", 8, *engines, "--plan-only") == 0
    said = capsys.readouterr()
    assert not out.exists() and not (tmp_path / "engines").exists()
    plan = last_line(said.out)["plan"]
    assert {name: (c["images"], c["rows"], c["calls_per_group"], c["bound"]) for name, c in plan["calls"].items()} == {
        "unet": (8, 16, 5, "--micro-batch"),
        "decode": (8, 8, 5, "--micro-batch"),
        "gradient": (8, 8, 5, "--micro-batch"),
    }
    assert plan["calls"]["gradient"]["bytes"] > plan["calls"]["decode"]["bytes"] > 0
    # three steps, each guided: calls of a group
    counted = {name: timing["calls_per_group"] for name, timing in plan["timings"].items()}
    assert counted == {"unet": 15, "decode": 5, "gradient": 15, "write": 40}
    total = sum(timing["seconds"] * timing["calls_per_group"] for timing in plan["timings"].values())
    assert plan["predicted_seconds"] == pytest.approx(total, abs=1e-3) and plan["groups"] == 1
    assert plan["work"].keys() == {"unet", "decode", "gradient"} and plan["work"]["unet"]["flop"] > 0
    assert (
        "images a call" in said.err
        and "GFLOP an image" in said.err
        and said.err.splitlines()[-1].startswith("predicted: ")
    )


def test_the_plan_counts_what_is_missing(call, engines, tmp_path, capsys):
    argv = ("--out", tmp_path / "out", "--count", 10, "--shard-size", 4, *engines)
    assert call(*argv) == 0
    (result,) = [json.loads((tmp_path / "out/result.json").read_text())]
    assert result["plan"]["images"] == 10
    capsys.readouterr()
    assert call(*argv, "--plan-only") == 0
    plan = last_line(capsys.readouterr().out)["plan"]
    assert (plan["images"], plan["groups"], plan["predicted_images_per_second"]) == (0, 0, None)


def test_planning_changes_no_result_and_no_random_state(call, engines, tmp_path, monkeypatch):
    states = []
    make_plan, predict = generate.make_plan, generate.predict

    def watched(function):
        def run(*arguments):
            before = torch.get_rng_state()
            found = function(*arguments)
            states.append(torch.equal(before, torch.get_rng_state()))
            return found

        return run

    monkeypatch.setattr(generate, "make_plan", watched(make_plan))
    monkeypatch.setattr(generate, "predict", watched(predict))
    assert call("--out", tmp_path / "one", *engines) == 0
    assert states == [True, True]
    monkeypatch.setattr(generate, "predict", lambda *_: {})
    assert call("--out", tmp_path / "two", *engines) == 0
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


CASES = {
    # network -> (what is short of memory, rows that fit, how they are counted, images a call in the end)
    "unet": (Prior, "denoise", 40, len, 16),  # two rows an image: 40 images, then 16 (half of 40, in multiples of 16)
    "decode": (Prior, "decode", 20, len, 16),
    "gradient": (Guidance, "of_batch", 20, len, 16),
}


@pytest.mark.parametrize("network", CASES)
def test_out_of_memory_gives_smaller_calls_and_the_same_images(call, engines, tmp_path, monkeypatch, capsys, network):
    owner, name, fits, rows_of, images = CASES[network]
    whole, short, again = tmp_path / "whole", tmp_path / "short", tmp_path / "again"
    # the decoder is short at the end alone: with a gradient its rows are those of the gradient
    guided = ("--guidance-step", 0) if network == "decode" else ()
    assert call("--out", whole, *GROUP, *guided, "--engines", tmp_path / "others") == 0
    planned = json.loads((whole / "result.json").read_text())["plan"]["calls"]
    assert {c["images"] for c in planned.values()} == {40}
    failures = []
    with monkeypatch.context() as patch:
        tight(patch, owner, name, fits, rows_of, failures)
        capsys.readouterr()
        assert call("--out", short, *GROUP, *guided, *engines) == 0
        said = capsys.readouterr()
        assert len(failures) == 1  # half, at once, and never again
        line = f"{network}: out of memory with 40 images a call; the group is sampled again with {images}"
        assert f"{line} (remembered for the next run)" in said.err.splitlines()
        assert last_line(said.out)["rows"][network] == images
        assert shards_of(short) == shards_of(whole)  # bit for bit
        assert call("--out", again, *GROUP, *guided, *engines) == 0
    assert len(failures) == 1
    result = json.loads((again / "result.json").read_text())
    call_plan = result["plan"]["calls"][network]
    assert (call_plan["images"], call_plan["bound"]) == (images, "remembered")
    assert "out of memory before (remembered)" in capsys.readouterr().err
    assert shards_of(again) == shards_of(whole)


def test_halved_as_often_as_it_takes(call, engines, tmp_path, monkeypatch, capsys):
    failures = []
    tight(monkeypatch, Guidance, "of_batch", 3, len, failures)
    assert call("--out", tmp_path / "out", *GROUP, *engines) == 0
    # 40 -> 16 -> 8 -> 4 -> 2; of_batch is also how the parts of a group are taken
    assert failures == [40, 16, 8, 4]
    assert last_line(capsys.readouterr().out)["rows"] == {"unet": 40, "decode": 40, "gradient": 2}
    entries = json.loads((tmp_path / "engines" / REMEMBERED).read_text())
    assert [(e["network"], e["images"]) for e in entries] == [("gradient", 2)]


def test_one_image_that_does_not_fit_ends_in_words(call, engines, tmp_path, monkeypatch, capsys):
    tight(monkeypatch, Prior, "denoise", 1)  # one image has two rows
    assert call("--out", tmp_path / "out", *GROUP, *engines) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a unet call of one image runs out of memory: CUDA out of memory" in error and "--size" in error
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_micro_batch_that_is_named_is_the_most(call, engines, tmp_path, monkeypatch, capsys):
    tight(monkeypatch, Guidance, "of_batch", 5)
    assert call("--out", tmp_path / "out", *GROUP, *engines, "--micro-batch", 10) == 0
    said = capsys.readouterr()
    assert last_line(said.out)["rows"] == {"unet": 10, "decode": 10, "gradient": 5}
    assert "gradient: out of memory with 10 images a call; the group is sampled again with 5" in said.err


@pytest.mark.parametrize("content", ["{", "[]", '[{"network": "unet", "images": 0}]', '[{"images": 3}]', "7", "[null]"])
def test_a_damaged_memory_is_said_and_mended(call, engines, tmp_path, monkeypatch, capsys, content):
    (tmp_path / "engines").mkdir()
    file = tmp_path / "engines" / REMEMBERED
    file.write_text(content)
    tight(monkeypatch, Prior, "denoise", 40)
    assert call("--out", tmp_path / "out", *GROUP, *engines) == 0
    said = capsys.readouterr().err
    assert (f"{file} " in said) == (content != "[]")
    assert [entry["images"] for entry in json.loads(file.read_text())] == [16]


def test_a_memory_that_cannot_be_written_is_said(call, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")  # a file stands where the folder should be
    tight(monkeypatch, Prior, "denoise", 40)
    assert call("--out", tmp_path / "out", *GROUP, "--engines", tmp_path / "file" / "engines") == 0
    said = capsys.readouterr()
    assert "sampled again with 16 (not remembered: " in said.err and last_line(said.out)["rows"]["unet"] == 16


@pytest.mark.parametrize("more", [("--dtype", "bf16"), ("--size", 8), ("--cfg", 1), ("--gradient", "unet")], ids=str)
def test_other_networks_are_not_made_smaller(call, engines, tmp_path, monkeypatch, capsys, more):
    with monkeypatch.context() as patch:
        tight(patch, Prior, "denoise", 40)
        assert call("--out", tmp_path / "out", *GROUP, *engines) == 0
    capsys.readouterr()
    assert call("--out", tmp_path / "other", *GROUP, *engines, *more, "--plan-only") == 0
    calls = last_line(capsys.readouterr().out)["plan"]["calls"]
    assert {c["bound"] for c in calls.values()} == {"group"}


def test_images_that_were_seen(call, engines, tmp_path, monkeypatch):
    """The rows that the result states are those of the calls."""
    seen = []
    real = Prior.denoise
    monkeypatch.setattr(Prior, "denoise", lambda self, z, *rest: (seen.append(len(z)), real(self, z, *rest))[1])
    assert call("--out", tmp_path / "out", *GROUP, *engines, "--batch", 16) == 0
    sampled = seen[-9:]  # three steps of three calls; before them those that were measured, of one image and two
    assert sampled == [32] * 9
    assert json.loads((tmp_path / "out/result.json").read_text())["rows"] == {"unet": 16, "decode": 16, "gradient": 40}
    assert images_of(tmp_path / "out").images.shape[0] == 40


def test_a_plan_for_gpus_that_are_not_here(call, engines, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ("--out", out, *GROUP, *engines, "--plan-only", "--plan-for")
    plans = []
    for gpus in ("H100", "8xh100"):
        assert call(*argv, gpus, "--count", 320) == 0
        said = capsys.readouterr()
        plans.append(last_line(said.out)["plan"])
        assert said.err.splitlines()[-1].startswith("predicted: ")
    assert not out.exists() and not (tmp_path / "engines").exists()
    one, eight = plans
    assert (one["devices"], one["device"], one["images"]) == (1, "H100 SXM", 320) and eight["devices"] == 8
    assert one["floor_seconds"] == pytest.approx(8 * eight["floor_seconds"])  # eight groups
    assert one["work"] == eight["work"] and one["work"]["unet"]["flop"] > 0
    assert one["floor_seconds"] < one["eager_floor_seconds"] < one["predicted_seconds"][1]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--plan-for", "H100"), "only with --plan-only"),
        (("--plan-only", "--plan-for", "H10"), "is none of H200"),
        (("--plan-only", "--plan-for", "H100", "--quantise", "int8"), "leave --quantise out"),
    ],
)
def test_a_plan_for_nothing_is_refused(call, tmp_path, capsys, more, message):
    assert call("--out", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "rows, flop, trial",
    [
        (200, 22e7, 32),  # the demo's UNet: 45, in multiples of 16
        (20, 22e7, 20),  # no more than planned
        (200, 1e9, 10),
        (16, 16e11, 1),  # Stable Diffusion
        (8, 0, 8),
    ],
)
def test_a_trial_has_as_many_rows_as_its_flop_allow(rows, flop, trial):
    assert seconds.trial_rows(rows, int(flop), seconds.TRIAL) == trial


@pytest.mark.parametrize("later, calls", [(0.5, 2), (9.0, 1)])
def test_a_first_call_does_not_count_where_another_is_cheap(monkeypatch, later, calls):
    """Five times the rows, in calls of two: two and a half times the seconds."""
    clock = iter([0.0, max(2.0, later), 20.0, 20.0 + later])
    monkeypatch.setattr(seconds.time, "perf_counter", lambda: next(clock))
    tried: list[int] = []
    assert seconds._tried(tried.append, 40, 8, 2, CPU) == (2.5 * later, 8)
    assert tried == [8] * calls


def test_a_trial_that_is_short_of_memory_ends_no_run():
    """As on a GPU, where calls are tried with the planned rows."""
    tried: list[int] = []

    def call(rows):
        tried.append(rows)
        if rows > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert seconds._tried(call, 40, 40, 1, CPU)[1] == 10 and tried == [40, 20, 10, 10]
    assert seconds._tried(lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("no")), 40, 40, 1, CPU) == (0.0, 0)
