"""dfkd-generate with a prior of every family: it draws, goes on, and refuses what the family has no use for."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dfkd.data import read_folder
from tests.cli.small_generate import last_line

FAMILIES = [
    ("sd2", "ddim"),
    ("sd-turbo", "euler"),
    ("lcm", "lcm"),
    ("sdxl", "euler"),
    ("sdxl-turbo", "euler-ancestral"),
    ("dit", "ddim"),
    ("sd3", "euler"),
    ("pixels", "ddpm"),
    ("pixels-flat", "ddim"),
    ("class-pixels", "ddim"),
    ("class-latents", "ddim"),
]


@pytest.mark.parametrize("name, sampler", FAMILIES)
def test_it_draws_guided_images_and_goes_on(name, sampler, call, tiny_prior, tmp_path, capsys):
    given = ("--prior", tiny_prior(name), "--sampler", sampler, "--backend", "eager", "--out", tmp_path / "out")
    assert call(*given) == 0
    pool = read_folder(tmp_path / "out")
    assert pool.images.shape == (4, 3, 16, 16) and pool.labels.tolist() == [0, 1, 2, 0]
    assert pool.images.float().std(0).mean() > 2  # images differ
    assert all(record.losses for record in pool.records)
    capsys.readouterr()
    assert call(*given) == 0 and last_line(capsys.readouterr().out)["images_written"] == 0


@pytest.fixture
def copied(tiny_prior, tmp_path):
    """Name of a family -> a copy of its prior to change."""
    return lambda name: Path(shutil.copytree(tiny_prior(name), tmp_path / name))


def test_names_of_classes_enter_what_a_run_is(call, tiny_prior, copied, tmp_path, capsys):
    given = ("--backend", "eager", "--out", tmp_path / "out")
    assert call("--prior", tiny_prior("dit"), *given) == 0
    folder = copied("dit")
    change_names(folder, {"0": "one", "1": "zero"})
    capsys.readouterr()
    assert call("--prior", folder, *given) == 2
    assert "conditions" in capsys.readouterr().err


def change_names(folder, names):
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] |= names
    (folder / "model_index.json").write_text(json.dumps(index))


def without_a_class(folder):
    change_names(folder, {"1": "uno"})


def with_a_class_twice(folder):
    change_names(folder, {"1": "uno, one", "7": "seven, one"})


def unnamed(folder):
    (folder / "dfkd.json").unlink()


def odd_null_class(folder):
    (folder / "dfkd.json").write_text('{"labels": ["zero", "one", "two"], "null_class": 0}')


def null_class_of_another_type(folder):
    (folder / "dfkd.json").write_text('{"labels": ["zero", "one", "two"], "null_class": 3.0}')


def null_class_of_a_transformer(folder):
    (folder / "dfkd.json").write_text('{"null_class": 1000}')


def nameless_class(folder):
    (folder / "dfkd.json").write_text('{"labels": ["zero", "one", " "], "null_class": 3}')


def without_its_null_class(folder):
    (folder / "dfkd.json").write_text('{"labels": ["zero", "one", "two"]}')


@pytest.mark.parametrize(
    "name, spoil, options, message",
    [
        ("dit", without_a_class, (), r"no class 'one'.*it knows 1000 classes.*Use a teacher whose classes it has"),
        ("dit", with_a_class_twice, (), r"class 'one'.*it names the ids 1 \(uno, one\), 7 \(seven, one\)"),
        ("dit", None, ("--prompt", "a photo of a {label}"), "no class 'a photo of a zero'.*the prompt is the class's"),
        ("dit", None, ("--negative-prompt", "blurred"), "negative-prompt 'blurred' cannot act.*DiT"),
        ("lcm", None, ("--sampler", "lcm", "--negative-prompt", "blurred"), "cannot act"),
        ("pixels", None, ("--negative-prompt", "blurred"), "cannot act"),
        ("pixels", None, ("--cfg", "3"), "--cfg 3 cannot act.*no unconditional rows"),
        ("class-pixels", unnamed, (), "takes 4 class ids, and 4 of them have no name"),
        ("class-pixels", odd_null_class, (), "null_class is 0; of 4 embeddings it is the last one, 3"),
        ("class-pixels", null_class_of_another_type, (), r"null_class is 3\.0; of 4 embeddings it is the last one, 3"),
        ("class-pixels", nameless_class, (), "labels.*none of them empty"),
        ("class-pixels", without_its_null_class, (), 'first 3.*"null_class": 3'),
        ("dit", null_class_of_a_transformer, (), "DiT has no use for it"),
        ("sd3", None, ("--sampler", "ddpm"), "rectified flow"),
    ],
)
def test_what_it_refuses(name, spoil, options, message, call, copied, tmp_path, capsys):
    folder = copied(name)
    if spoil:
        spoil(folder)
    assert call("--prior", folder, "--backend", "eager", "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(list(tmp_path.glob("out/shard-*"))) == 0

    assert re.search(message, error.replace("\n", " "), re.DOTALL), error


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sd2", ("--cfg", "1", "--negative-prompt", "blurred"), "'blurred' cannot act: .*with --cfg above 1 alone"),
        (
            "sd2",
            ("--cfg", "4", "--cfg-from", "0.7"),
            r"--cfg 4 cannot act: none of the 3 steps begins in --cfg-from 0.7",
        ),
        ("lcm", ("--sampler", "lcm", "--cfg-from", "0.5"), "--cfg-from and --cfg-to cannot act: .*as an input"),
        ("lcm", ("--sampler", "lcm", "--steps", "1", "--guide-from", "0.66"), "none of the 1 steps begins there"),
        ("pixels", ("--guide-from", "0.4", "--guide-to", "0.6"), "--guide-from 0.4 --guide-to 0.6 cannot act: none of"),
    ],
)
def test_what_would_not_act_is_refused(name, options, message, call, tiny_prior, tmp_path, capsys):
    assert call("--prior", tiny_prior(name), "--backend", "eager", "--out", tmp_path / "out", *options) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("pixels", ("--prompt", "a photo"), "--prompt does not act: the prior, UNet of pixels, is told nothing"),
        ("sd2", ("--cutmix-every", "3", "--steps", "3"), "--cutmix-every 3 does not act in 3 steps"),
    ],
)
def test_what_presets_carry_and_does_not_act_is_said(name, options, message, call, tiny_prior, tmp_path, capsys):
    assert call("--prior", tiny_prior(name), "--backend", "eager", "--out", tmp_path / "out", *options) == 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shares", [("--guide-from", "1"), ("--guide-from", "0.3", "--guide-to", "0.4")])
def test_a_share_without_steps_and_one_step_act_as_they_say(shares, call, tiny_prior, tmp_path):
    given = ("--prior", tiny_prior("pixels"), "--backend", "eager", "--out", tmp_path / "out")
    assert call(*given, *shares) == 0
    guided = [record.losses for record in read_folder(tmp_path / "out").records]
    assert all(bool(losses) == (len(shares) == 4) for losses in guided)


@pytest.mark.parametrize("labels", [["zero, naught", "ONE", "two"], ["naught, zero", "one", "Two"]])
def test_a_name_that_was_found_is_not_called_unknown(labels, call, copied, tmp_path, capsys):
    folder = copied("class-pixels")
    (folder / "dfkd.json").write_text(json.dumps({"labels": labels, "null_class": 3}))
    assert call("--prior", folder, "--backend", "eager", "--out", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err
