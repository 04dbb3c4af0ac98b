"""dfkd-generate: what it writes, what it refuses before work, how it goes on, and what it would take."""

import json
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from dfkd.config import leaves
from dfkd.config.commands import GenerateCommand
from dfkd.data import read_folder
from dfkd.synthesis import command, plan
from dfkd.synthesis.pipeline import GuidedPipeline
from tests.cli.small_generate import last_line, save_classifier, shards_of


def test_what_it_writes(call, tmp_path, capfd):
    out = tmp_path / "out"
    assert call("--out", out, "--count", 10, "--shard-size", 8, "--seed", 7, "--format", "imagefolder") == 0
    streams = capfd.readouterr()
    result = last_line(streams.out)
    assert (result["images"], result["images_written"], result["shards_written"]) == (10, 10, 2)
    assert result["class_counts"] == [4, 3, 3] and result["class_names"] == ["zero", "one", "two"]
    assert result["images_per_second"] > 0 and result == json.loads((out / "result.json").read_text())
    assert result["run"].items() >= {"call_size": 64, "threads": torch.get_num_threads(), "engines": {}}.items()
    assert Path(result["run"]["prior"]).is_dir()
    assert Image.open(out / "preview.png").width > 48 and len((out / "log.jsonl").read_text().splitlines()) == 2
    assert result["plan"]["calls"].keys() == {"unet", "decode", "gradient"} and result["kernels"] == "torch"
    # quiet without a terminal: lines about the run, no bars and no hints of the libraries that load the networks
    starts = [
        "teacher: resnet8, 3 classes, fed 16 x 16 pixels",
        "kernels: torch",
        "unet, decode, gradient: eager",
        "plan: calls of 64 images",
        "10 images of 16x16, 10 to",
        f"made: {out}, 10 images of 3 classes; preview.png shows some",
        f"next: dfkd-distill --data {out} --teacher-checkpoint ",
    ]
    lines = streams.err.splitlines()
    assert len(lines) == len(starts) and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    settings = json.loads((out / "settings.json").read_text())
    assert settings["command"] == "dfkd-generate" and settings["options"]["seed"] == 7
    manifest = json.loads((out / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [8, 2]
    with tarfile.open(out / "shard-00001.tar") as tar:
        assert tar.getnames() == [f"{i:08d}.{end}" for i in (8, 9) for end in ("png", "cls", "json")]
    pool = read_folder(out)
    assert pool.images.shape == (10, 3, 16, 16) and pool.labels.tolist() == [i % 3 for i in range(10)]
    assert pool.images.float().std(0).mean() > 2  # images differ
    exported = sorted(path.relative_to(out / "imagefolder") for path in (out / "imagefolder").rglob("*.png"))
    assert exported == sorted(Path(r.class_name) / f"{r.id:08d}.png" for r in pool.records)


def test_it_is_the_pipelines_own_images(call, small_prior, small_teacher, tmp_path):
    argv = {"count": 10, "shard_size": 8, "group": 4, "steps": 3, "seed": 7, "device": "cpu", "batch": 4}
    assert (
        call("--out", tmp_path, *(str(word) for k, v in argv.items() for word in ("--" + k.replace("_", "-"), v))) == 0
    )
    asked = GenerateCommand.of(out=tmp_path, prior=str(small_prior), teacher_checkpoint=small_teacher, **argv)
    sample = command.pipeline_of(asked)([9, 1], seed=7)
    assert torch.equal(sample.images, read_folder(tmp_path).images[[9, 1]])


def test_settings_given_back_are_the_same_run(call, tmp_path):
    argv = ["--count", 6, "--only", "two,zero", "--cfg", 2, "--sampler", "euler"]
    assert call("--out", tmp_path / "one", *argv) == 0
    settings = tmp_path / "one/settings.json"
    assert call("--config", settings, "--out", tmp_path / "two", "--count", 6) == 0
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")
    known = leaves(GenerateCommand)
    options = [json.loads((tmp_path / name / "settings.json").read_text())["options"] for name in ("one", "two")]
    assert options[0].keys() == known.keys() and {k for k in known if options[0][k] != options[1][k]} == {"out"}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--only", "zero,cat"], ["unknown class 'cat'", "classes include zero, one, two"]),
        (["--only", "zero,zero"], ["class 'zero' is named twice"]),
        (["--sampler", "plms"], ["sampler is 'plms'", "one of ddpm, ddim, euler, euler-ancestral, dpmpp2m, lcm"]),
        (["--shard-size", 6], ["--shard-size 6 is not a multiple of --group 4"]),
        (["--count", 0], ["count is '0'", "at least 1"]),
        (["--seed", 2**64], ["seed is", "at most 18446744073709551615"]),
        (["--guide-from", 0.6, "--guide-to", 0.4], ["--guide-from 0.6 lies after --guide-to 0.4"]),
        (["--adv-weight", 1], ["--adv-weight above 0 needs --student-checkpoint"]),
        (["--noise-edit-steps", 2, "--guidance-step", 0], ["--noise-edit-steps needs guidance"]),
        (["--classes", "zero,one"], ["--classes names 2 classes: zero, one", "the teacher has 3: zero, one, two"]),
        (["--prompt", "a {class}"], ["prompt 'a {class}' cannot be filled in", "use {label}"]),
        (["--size", 15], ["--size 15 does not fit the prior", "multiple of 2"]),
        (["--steps", 1000], ["1000 steps with steps_offset 1"]),
        (["--prior", "no/such/folder"], ["no/such/folder: no such folder"]),
        (["--teacher-checkpoint", "no-such-folder"], ["no checkpoint no-such-folder"]),
        (["--teacher", "resnet20"], ["holds a resnet8, not a resnet20"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
        (["--kernels", "cuda"], ["kernels is 'cuda'", "one of auto, triton, torch"]),
        (["--method", "gan"], ["method is 'gan'", "one of guided, deepinversion, fast, cmi"]),
        (["--method", "noise(grey=3)"], ["method 'noise(grey=3)': grey is 3", "correct its settings"]),
        (["--method", "no.py:Such"], ["no file no.py"]),
        (["--method", "deepinversion", "--plan-only"], ["--plan-only with --method deepinversion"]),
        (["--method", "deepinversion(group=3)", "--shard-size", 4], ["groups of 3", "give a multiple of 3"]),
        (["--batchh", 4], ["unknown argument --batchh", "did you mean --batch"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_refused_before_work(call, tmp_path, capsys, argv, words):
    assert call("--out", tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not list(tmp_path.glob("out/shard-*"))


def refused(call, capsys, *argv):
    assert call(*argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_networks_that_do_not_fit_are_refused(call, small_prior, small_teacher, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    student = save_classifier(tmp_path / "student", names=("a", "b"))
    error = refused(call, capsys, *out, "--adv-weight", 1, "--student-checkpoint", student)
    assert "has 2 classes that are not the teacher's" in error
    shutil.copytree(small_prior, tmp_path / "prior")
    shutil.rmtree(tmp_path / "prior" / "vae")
    assert "vae/" in refused(call, capsys, *out, "--prior", tmp_path / "prior")
    file = shutil.copy(small_teacher / "model.safetensors", tmp_path / "weights.safetensors")
    bare = ["--teacher", "resnet8", "--teacher-checkpoint", file, "--normalisation", "cifar10", "--classes", "zero,one"]
    assert "does not fit resnet8 with 2 classes" in refused(call, capsys, *out, *bare)


def test_folders_and_disks_that_do_not_take_it_are_refused(call, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")  # permissions do not stop root
    error = refused(call, capsys, "--out", tmp_path / "file" / "out")
    assert "cannot write to" in error and "--out" in error
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 999, 999))
    for form, images in (("webdataset", 4), ("imagefolder", 8)):
        error = refused(call, capsys, "--out", tmp_path / form, "--format", form)
        assert f"{images} images of 16x16 as png need up to" in error and "free some space" in error


def test_images_that_are_not_finite_end_the_run_in_words(call, tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--guidance-norm", "none", "--guidance-step", 1e38]
    error = refused(call, capsys, *argv)
    assert "are not finite: first is the latents, beyond 1000, at step 1 of 3. lower --guidance-step." in error


def test_a_run_is_taken_up_and_mended(call, tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--count", 10, "--shard-size", 4, "--batch", 4]
    assert call(*argv) == 0
    before = shards_of(tmp_path / "out")
    (tmp_path / "out/shard-00000.tar").unlink()
    (tmp_path / "out/shard-00002.tar").write_bytes(before["shard-00002.tar"][:600])
    capsys.readouterr()
    assert call(*argv, "--batch", 2) == 0
    streams = capsys.readouterr()
    result = last_line(streams.out)
    assert (result["images_written"], result["shards_before"], result["plan"]) == (6, 1, None)
    assert "calls of 4, groups of 4" in streams.err and "as the folder was begun" in streams.err
    assert shards_of(tmp_path / "out") == before
    assert call(*argv) == 0
    again = last_line(capsys.readouterr().out)
    assert again["images_written"] == 0 and again["images_per_second"] is None
    assert again["class_counts"] == result["class_counts"]


def test_other_settings_are_refused_by_name(call, small_prior, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert call(*out) == 0
    before = shards_of(tmp_path / "out"), (tmp_path / "out/settings.json").read_text()
    error = refused(call, capsys, *out, "--seed", 8, "--steps", 2, "--batch", 2)
    assert "seed is 0 there and 8 here" in error and "steps is 3 there and 2 here" in error and "batch" not in error
    other = save_classifier(tmp_path / "other", seed=5)
    assert "teacher_digest is" in refused(call, capsys, *out, "--teacher-checkpoint", other)
    prior = shutil.copytree(small_prior, tmp_path / "prior")
    config = json.loads((prior / "scheduler/scheduler_config.json").read_text())
    (prior / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    assert "scheduler is " in refused(call, capsys, *out, "--prior", prior)
    assert before == (shards_of(tmp_path / "out"), (tmp_path / "out/settings.json").read_text())
    assert call(*out, "--prior", shutil.copytree(small_prior, tmp_path / "elsewhere")) == 0  # the same prior


OWN = """
import torch
from dfkd.synthesis.synthesizer import Sample, records_of


class Constant:
    name, group, needs_prior = "constant", 1, False

    def __init__(self, prior, teacher, config, level=0.5):
        assert prior is None
        self.class_names, self.image_size, self.level = teacher.class_names, teacher.input_size, level

    def identity(self):
        return {"level": self.level}

    def __call__(self, ids, labels=None, seed=0):
        labels = torch.tensor(labels or [i % len(self.class_names) for i in ids])
        images = torch.full((len(ids), 3, self.image_size, self.image_size), int(255 * self.level)).byte()
        return Sample(images, labels, records_of(ids, labels, self.class_names, seed))
"""


def test_a_method_in_a_file_of_ones_own(call, tmp_path, capsys):
    file, out = tmp_path / "own.py", tmp_path / "out"
    file.write_text(OWN)
    argv = ["--out", out, "--count", 8, "--method", f"{file}:Constant(level=0.25)"]
    assert call(*argv) == 0
    assert read_folder(out).images.unique().tolist() == [63] and read_folder(out).settings["method"] == "constant"
    assert "level is 0.25 there and 0.5 here" in refused(call, capsys, *argv[:-1], f"{file}:Constant")
    changed = tmp_path / "changed.py"
    changed.write_text(OWN.replace("int(255 * self.level)", "int(254 * self.level)"))
    assert "source is " in refused(call, capsys, *argv[:-1], f"{changed}:Constant(level=0.25)")


def test_methods_without_a_prior_load_none(call, tmp_path, monkeypatch):
    monkeypatch.setattr(command.Prior, "from_pretrained", None)
    for method in ("noise", "deepinversion(steps=2)"):
        assert call("--out", tmp_path / method, "--method", method) == 0
        pool = read_folder(tmp_path / method)
        assert pool.images.shape == (4, 3, 16, 16) and pool.labels.tolist() == [0, 1, 2, 0]


def test_plan_only_writes_nothing_and_counts_what_is_missing(call, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    argv = ("--out", out, "--count", 40, "--group", 20, "--batch", 40, "--cfg-to", 0.5, "--guide-from", 0.5)
    argv += ("--refine-steps", 5)
    assert call(*argv, "--plan-only") == 0
    said = capsys.readouterr()
    assert not out.exists()
    plan = last_line(said.out)["plan"]
    images = {name: found["images"] for name, found in plan["calls"].items()}
    assert images == {"unet": 40, "decode": 40, "gradient": 20, "pixel_gradient": 20}  # a gradient is of a group
    calls = {name: timing["calls"] for name, timing in plan["timings"].items()}
    # classifier-free guidance in two of three steps, guidance in one
    assert calls == {"unet": 2.5, "decode": 1, "gradient": 2, "pixel_gradient": 10, "write": 40}
    total = sum(timing["seconds"] * timing["calls"] for timing in plan["timings"].values())
    assert plan["predicted_seconds"] == pytest.approx(total, abs=1e-3)
    assert plan["calls"]["gradient"]["bytes"] > plan["calls"]["decode"]["bytes"] / 2 > 0
    assert said.err.splitlines()[-2].startswith("predicted: ")
    assert call("--out", out) == 0
    capsys.readouterr()
    assert call("--out", out, "--plan-only") == 0
    plan = last_line(capsys.readouterr().out)["plan"]
    assert plan["images"] == 0 and plan["predicted_images_per_second"] is None


def test_short_memory_gives_smaller_calls_and_the_same_images(call, tmp_path, monkeypatch, capsys):
    argv = ("--count", 16, "--group", 8, "--batch", 16, "--shard-size", 16, "--seed", 3)
    assert call("--out", tmp_path / "whole", *argv) == 0
    capsys.readouterr()
    real, rows = GuidedPipeline.denoise, []

    def tight(self, z, t, context):
        rows.append(len(z))
        if len(z) > 10 and self.call_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, z, t, context)

    monkeypatch.setattr(GuidedPipeline, "denoise", tight)
    monkeypatch.setattr(plan, "network_calls", lambda pipe: {})
    assert call("--out", tmp_path / "short", *argv) == 0
    said = capsys.readouterr()
    assert rows[:3] == [32, 16, 8]  # two rows an image
    assert "unet: out of memory in calls of 16 images (CUDA out of memory. Tried to allocate 2.00 GiB)" in said.err
    assert last_line(said.out)["run"]["call_size"] == 4
    whole, short = (read_folder(tmp_path / name) for name in ("whole", "short"))
    assert torch.equal(whole.labels, short.labels) and (whole.images.int() - short.images.int()).abs().max() <= 2
