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
