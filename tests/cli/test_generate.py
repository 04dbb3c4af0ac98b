"""dfkd-generate: what it writes, what it refuses before work, how it goes on."""

import json
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from dfkd.cli import prepare
from tests.cli.small_generate import images_of, last_line, save_classifier, shards_of


def test_what_it_writes(call, tmp_path, capfd):
    out = tmp_path / "out"
    assert call("--out", out, "--count", 10, "--shard-size", 8, "--seed", 7, "--format", "imagefolder") == 0
    streams = capfd.readouterr()
    result = last_line(streams.out)
    assert (result["images"], result["images_written"], result["shards_written"]) == (10, 10, 2)
    assert result["class_counts"] == [4, 3, 3] and result["class_names"] == ["zero", "one", "two"]
    assert result["images_per_second"] > 0 and result == json.loads((out / "result.json").read_text())
    # quiet without a terminal: lines about the run, no bars and no hints of the libraries that load the networks
    *lines, last = streams.err.splitlines()
    assert lines[:3] == [
        "unet, decode, gradient: eager (no engine is built: dfkd-engines build)",
        "kernels: torch (the device is cpu)",
        "10 images of 16x16, 10 to compute on cpu in fp32; groups of 4; 2 more complete the last group and are dropped",
    ]
    assert lines[3].startswith("plan: groups of 4 images; weights and a group's images take ")
    table = [line.split() for line in lines[4:]]
    assert [row[0] for row in table] == ["network", "unet", "decode", "gradient", "write"]
    assert all(row[1:3] == ["4", "1"] and row[5] == "group" for row in table[1:-1])
    assert last.startswith("predicted: ") and " for 10 images, " in last and last.count("\n") == 0
    assert result["rows"] == {"unet": 4, "decode": 4, "gradient": 4}
    assert result["plan"]["groups"] == 3 and result["plan"]["predicted_seconds"] > 0
    settings = json.loads((out / "settings.json").read_text())
    assert settings["command"] == "dfkd-generate" and settings["options"]["seed"] == 7
    assert {"torch", "diffusers", "dfkd"} <= settings["versions"].keys()
    manifest = json.loads((out / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [8, 2]
    with tarfile.open(out / "shard-00001.tar") as tar:
        assert tar.getnames() == [f"{i:08d}.{end}" for i in (8, 9) for end in ("png", "cls", "json")]
    pool = images_of(out)
    assert pool.images.shape == (10, 3, 16, 16) and pool.labels.tolist() == [i % 3 for i in range(10)]
    assert pool.images.float().std(0).mean() > 2  # images differ
    exported = sorted(path.relative_to(out / "imagefolder") for path in (out / "imagefolder").rglob("*.png"))
    assert exported == sorted(Path(r.class_name) / f"{r.id:08d}.png" for r in pool.records)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--only", "zero,cat"], ["unknown class 'cat'", "classes include zero, one, two"]),
        (["--only", "zero,zero"], ["class 'zero' is named twice"]),
        (["--sampler", "plms"], ["--sampler is 'plms'", "one of ddpm, ddim, euler, dpmpp2m"]),
        (["--shard-size", 6], ["--shard-size 6 is not a multiple of --group 4"]),
        (["--count", 0], ["--count is 0", "at least 1"]),
        (["--seed", 2**64], ["--seed is", "at most 18446744073709551615"]),
        (["--guide-from", 0.6, "--guide-to", 0.4], ["--guide-from 0.6 lies after --guide-to 0.4"]),
        (["--cfg-from", 0.6, "--cfg-to", 0.4], ["--cfg-from 0.6 lies after --cfg-to 0.4"]),
        (["--adv-weight", 1], ["--adv-weight above 0 needs --student-checkpoint"]),
        (["--noise-edit-steps", 2, "--guidance-step", 0], ["--noise-edit-steps needs guidance"]),
        (["--classes", "zero,one"], ["--classes names 2 classes: zero, one", "the teacher has 3: zero, one, two"]),
        (["--classes", "two,one,zero"], ["the teacher has 3: zero, one, two", "in its order"]),
        (["--prompt", "a {class}"], ["prompt 'a {class}' cannot be filled in", "use {label}"]),
        (["--size", 15], ["--size 15 does not fit the prior", "multiple of 2"]),
        (["--steps", 1000], ["1000 steps with steps_offset 1", "Take fewer steps"]),
        (["--prior", "no/such/folder"], ["prior no/such/folder: no such folder", "unet/, vae/, text_encoder/"]),
        (["--teacher-checkpoint", "no-such-folder"], ["no checkpoint no-such-folder"]),
        (["--teacher", "resnet20"], ["holds a resnet8, not a resnet20"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
        (["--device", "quantum"], ["quantum"]),
        (["--kernels", "cuda"], ["--kernels is 'cuda'", "one of auto, triton, torch"]),
        (["--bacth", 4], ["unknown argument --bacth", "did you mean --batch"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_refused_before_work(call, tmp_path, capsys, argv, words):
    assert call("--out", tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("out/shard-*"))


def refused(call, capsys, *argv):
    assert call(*argv) == 2
    return capsys.readouterr().err


def test_teacher_file_and_class_count_disagree(call, small_teacher, tmp_path, capsys):
    file = shutil.copy(small_teacher / "model.safetensors", tmp_path / "weights.safetensors")
    argv = ["--out", tmp_path / "out", "--teacher", "resnet8", "--teacher-checkpoint", file]
    argv += ["--normalisation", "cifar10", "--classes", "zero,one"]
    assert "does not fit resnet8 with 2 classes" in refused(call, capsys, *argv)


def test_a_teacher_with_more_logits_than_names(call, small_teacher, tmp_path, capsys, monkeypatch):
    load = prepare.load_teacher

    def with_a_wrong_head(*arguments):
        teacher = load(*arguments)
        teacher.module.register_forward_hook(lambda module, x, logits: torch.cat([logits, logits], 1))
        return teacher

    monkeypatch.setattr(prepare, "load_teacher", with_a_wrong_head)
    assert "gives 6 logits: there are 3 class names" in refused(call, capsys, "--out", tmp_path / "out")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_prior_folder_without_a_part(call, small_prior, tmp_path, capsys, part):
    shutil.copytree(small_prior, tmp_path / "prior")
    shutil.rmtree(tmp_path / "prior" / part)
    error = refused(call, capsys, "--out", tmp_path / "out", "--prior", tmp_path / "prior")
    assert f"{part}/" in error and "missing" in error


def test_folder_that_cannot_be_written(call, tmp_path, capsys):
    (tmp_path / "file").write_text("")  # permissions do not stop root
    error = refused(call, capsys, "--out", tmp_path / "file" / "out")
    assert "cannot write to" in error and "--out" in error


@pytest.mark.parametrize("form, images", [("webdataset", 4), ("imagefolder", 8)])
def test_too_little_disk(call, tmp_path, capsys, monkeypatch, form, images):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 999, 999))
    error = refused(call, capsys, "--out", tmp_path / "out", "--format", form)
    assert f"{images} images of 16x16 as png need up to" in error and "free some space" in error


def test_hub_id_without_a_network(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refused(call, capsys, "--out", tmp_path / "out", "--prior", "owner/name")
    assert "prior owner/name" in error and "could not be fetched" in error and "the network" in error


def test_losses_that_the_teacher_cannot_give(call, tmp_path, capsys, monkeypatch):
    load = prepare.load_teacher

    def without_batch_norm(*arguments):
        teacher = load(*arguments)
        for layer in teacher.batch_norms():
            layer.running_mean = layer.running_var = None
        return teacher

    monkeypatch.setattr(prepare, "load_teacher", without_batch_norm)
    error = refused(call, capsys, "--out", tmp_path / "out")
    assert "has no BatchNorm layer" in error and "use --bn-weight 0" in error
    editing = ["--bn-weight", 0, "--noise-edit-steps", 1]
    assert "--noise-edit-steps descends their loss" in refused(call, capsys, "--out", tmp_path / "out", *editing)


def test_student_of_other_classes(call, tmp_path, capsys):
    student = save_classifier(tmp_path / "student", names=("a", "b"))
    argv = ["--out", tmp_path / "out", "--adv-weight", 1, "--student-checkpoint", student]
    assert "has 2 classes that are not the teacher's" in refused(call, capsys, *argv)


def test_images_that_are_not_finite_end_the_run_in_words(call, tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--guidance-norm", "none", "--guidance-step", 1e38]
    error = refused(call, capsys, *argv)
    assert "are not finite. lower --guidance-step" in error.splitlines()[-1]


def test_damaged_and_missing_shards_are_made_again(call, tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--count", 10, "--shard-size", 4]
    assert call(*argv) == 0
    before = shards_of(tmp_path / "out")
    (tmp_path / "out/shard-00000.tar").unlink()
    (tmp_path / "out/shard-00002.tar").write_bytes(before["shard-00002.tar"][:600])
    capsys.readouterr()
    assert call(*argv) == 0
    result = last_line(capsys.readouterr().out)
    assert (result["images_written"], result["shards_before"]) == (6, 1) and shards_of(tmp_path / "out") == before
    assert call(*argv) == 0
    again = last_line(capsys.readouterr().out)
    assert again["images_written"] == 0 and again["images_per_second"] is None
    assert again["class_counts"] == result["class_counts"]


def test_other_settings_are_refused_by_name(call, small_prior, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert call(*out) == 0
    before = shards_of(tmp_path / "out")
    error = refused(call, capsys, *out, "--seed", 8, "--steps", 2, "--batch", 2)
    assert "seed is 0 there and 8 here" in error and "steps is 3 there and 2 here" in error and "batch" not in error
    assert "prior_digest" not in error
    other = save_classifier(tmp_path / "other", seed=5)
    assert "teacher_digest is" in refused(call, capsys, *out, "--teacher-checkpoint", other)
    prior = shutil.copytree(small_prior, tmp_path / "prior")
    config = json.loads((prior / "scheduler/scheduler_config.json").read_text())
    (prior / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    error = refused(call, capsys, *out, "--prior", prior)
    assert "scheduler.beta_end is 0.012 there and 0.02 here" in error
    assert shards_of(tmp_path / "out") == before
    prior = shutil.copytree(small_prior, tmp_path / "elsewhere")
    assert call(*out, "--prior", prior) == 0  # the same prior in another place


def test_batch_and_micro_batch_do_not_change_an_image(call, tmp_path):
    common = ["--count", 10, "--group", 6, "--shard-size", 6, "--cutmix-every", 1, "--seed", 7]
    found = {}
    for batch, micro in ((2, 2), (6, 0), (512, 0), (512, 4)):
        out = tmp_path / f"{batch}-{micro}"
        assert call("--out", out, *common, "--batch", batch, "--micro-batch", micro) == 0
        found[batch, micro] = images_of(out)
    first = found.pop((2, 2))
    for pool in found.values():
        assert torch.equal(pool.labels, first.labels)
        assert (pool.images.int() - first.images.int()).abs().max() <= 2
        assert [r.partner for r in pool.records] == [r.partner for r in first.records]
