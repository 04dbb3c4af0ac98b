"""dfkd-train-prior and dfkd-train-decoder: a folder of images becomes a prior that guides a run, with a decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfkd.cli import generate, train_decoder, train_prior
from dfkd.data import read_folder
from tests.cli.small_generate import last_line, save_classifier, status_of
from tests.training.small_run import result

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", 3, "--batch-size", 8, "--warmup", 0, "--device", "cpu"]
NEW = ["--size", 16, "--widths", "8,16", "--head-width", 8, "--norm-groups", 4, "--attention-at", 8, *SMALL]
LATENT = ["--space", "latent", "--condition", "text", "--predict", "v", "--text-width", 16]
LATENT += ["--autoencoder-widths", "8,8", "--latent-channels", 4, "--autoencoder-steps", 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir()
        for index in range(20):
            pixels = random.integers(0, 100, (20, 24, 3)) + 120 * label  # neither square nor of the size
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("teacher"), names=("dark", "light"))


def images_of(prior: Path, teacher: Path, out: Path, *more: object) -> Any:
    argv = ["--prior", prior, "--teacher-checkpoint", teacher, "--out", out, "--count", 4, "--group", 4, "--steps", 2]
    assert status_of(generate.main, *argv, "--device", "cpu", "--guide-from", 0, *more) == 0
    return read_folder(out).images


def test_a_prior_of_pixels_guides_a_run(data: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "prior"
    argv = ["--data", f"imagefolder:{data}", "--out", out, *NEW, "--judge", teacher]
    assert status_of(train_prior.main, *argv) == 0
    told = capsys.readouterr()
    found = last_line(told.out)
    assert found == result(out) and found["images"] == 28 and found["class_names"] == ["dark", "light"]
    assert found["judged"]["samples"] == 200 and "next: dfkd-generate --prior" in told.err
    names = ["README.md", "dfkd.json", "log.jsonl", "model_index.json", "preview.png", "result.json", "scheduler"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "settings.json", "unet"]
    assert json.loads((out / "settings.json").read_text())["command"] == "dfkd-train-prior"
    assert str(data) not in (out / "README.md").read_text()
    assert images_of(out, teacher, tmp_path / "made").shape == (4, 3, 16, 16)
    assert status_of(train_prior.main, *argv) == 0  # finished: its result again
    assert last_line(capsys.readouterr().out) == found


def test_a_latent_prior_guides_through_its_tiny_decoder(data: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    out, decoder = tmp_path / "prior", tmp_path / "decoder"
    assert status_of(train_prior.main, "--data", data, "--out", out, *NEW, *LATENT) == 0
    argv = ["--prior", out, "--out", decoder, "--images", 16, "--estimates", 2, "--sample-steps", 2, *SMALL]
    assert status_of(train_decoder.main, *argv, "--width", 8, "--blocks", 1) == 0
    told = capsys.readouterr()
    assert last_line(told.out) == result(decoder) and f"--guidance-decoder {decoder}" in told.err
    plain = images_of(out, teacher, tmp_path / "plain")
    own = images_of(out, teacher, tmp_path / "own", "--guidance-decoder", decoder)
    assert own.shape == (4, 3, 16, 16) and not (own == plain).all()
    assert read_folder(tmp_path / "own").settings["guidance_decoder_digest"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--size is missing: a prior that is trained from nothing needs the side of its images"),
        (["--size", 16, "--widths", "16,12"], "--widths has 12, which --head-width 16 does not divide"),
        (["--size", 18, "--steps", 1], "--size 18: 4 --widths halve the side 3 times"),
        (["--size", 16, "--steps", 1, "--kl-weight", 1], "--kl-weight acts with --space latent"),
        (["--size", 16, "--steps", 1, "--condition", "none", "--drop", 0.2], "--drop acts with a --condition"),
        (["--size", 16, "--steps", 1, "--condition", "text"], "it needs --space latent and --predict v or epsilon"),
        (["--prior", "demo", "--steps", 1, "--widths", 16], "--widths with --prior demo"),
        (["--size", 16, "--steps", 1, "--lora-rank", 4], "--lora-rank acts with --prior"),
    ],
)
def test_what_cannot_be_meant_is_refused_first(
    data: Path, tmp_path: Path, capsys: Any, argv: list[object], words: str
) -> None:
    assert status_of(train_prior.main, "--data", data, "--out", tmp_path / "out", *argv) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_data_that_is_not_there_is_refused(tmp_path: Path, capsys: Any) -> None:
    argv = ["--data", f"imagefolder:{tmp_path}/none", "--out", tmp_path / "out", *NEW]
    assert status_of(train_prior.main, *argv) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_prior_of_pixels_has_no_decoder_to_distil(tmp_path: Path, data: Path, capsys: Any) -> None:
    assert status_of(train_prior.main, "--data", data, "--out", tmp_path / "prior", *NEW) == 0
    assert status_of(train_decoder.main, "--prior", tmp_path / "prior", "--out", tmp_path / "x", *SMALL) == 2
    assert "it is of pixels, and has no decoder to distil" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_processes_share_a_prior_and_its_decoder_out(data: Path, tmp_path: Path) -> None:
    """Both stages of a latent prior, then the pairs and the training of its decoder."""
    prior, decoder = tmp_path / "prior", tmp_path / "decoder"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "engine", "kernels"))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dfkd"]
    given = ["--prior", prior, "--out", decoder, "--images", 32, "--estimates", 2, "--sample-steps", 2, *SMALL]
    for name, argv in (
        ("train-prior", ["--data", data, "--out", prior, *NEW, *LATENT]),
        ("train-decoder", [*given, "--width", 8, "--blocks", 1]),
    ):
        done = subprocess.run(
            [*words, name, *map(str, argv)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    assert result(prior)["processes"] == result(decoder)["processes"] == 2
    assert result(decoder)["pairs"] == 64
