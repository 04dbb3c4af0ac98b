"""Several clients' classifiers in, one student out: by the commands, and as one run with FedCADO's preset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dfkd.cli import distill, evaluate, export, generate
from dfkd.cli import run as running
from dfkd.data import open_folder
from dfkd.errors import UsageError
from dfkd.job import read_job
from dfkd_engine.priors.prior import Prior
from tests.cli.small_generate import last_line, save_classifier, shards_of, status_of

NAMES = ("zero", "one", "two", "three", "four")
SMALL = ("--count", 12, "--group", 3, "--batch", 6, "--steps", 3, "--shard-size", 6, "--device", "cpu")


@pytest.fixture
def clients(
    tmp_path: Path, small_prior: Path, cached_prior: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Of three classes each, of which one is the same; of 16 and 24 pixels."""
    monkeypatch.setattr(Prior, "from_pretrained", cached_prior)
    return (
        save_classifier(tmp_path / "a", 0, NAMES[:3], 16),
        save_classifier(tmp_path / "b", 1, NAMES[2:], 24),
    )


@pytest.mark.parametrize("teaching", ["joint", "each"])
def test_the_commands(
    clients: tuple[Path, Path],
    small_prior: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    teaching: str,
) -> None:
    own = ("--clients", clients[0], f"{clients[1]}:2")
    argv = (*own, "--prior", small_prior, "--teaching", teaching, "--out", tmp_path / "images", *SMALL)
    assert status_of(generate.main, *argv) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert last_line(told.out)["class_names"] == list(NAMES) and "2 of 5 classes in all" in told.err
    pool, before = open_folder(tmp_path / "images"), shards_of(tmp_path / "images")
    guides = [tuple(record.teachers or ()) for record in pool.records()]
    wanted = [str(clients[0])] * 3 + [str(clients[1])] * 3 if teaching == "each" else []
    assert guides == ([(name,) for name in 2 * wanted] if wanted else [()] * 12)
    (tmp_path / "images" / "shard-00001.tar").unlink()
    assert status_of(generate.main, *argv) == 0 and shards_of(tmp_path / "images") == before
    other = ("--clients", *reversed(clients), *argv[3:])
    capsys.readouterr()
    assert status_of(generate.main, *other) == 2 and "teacher" in capsys.readouterr().err

    learn = (*own, "--data", tmp_path / "images", "--student", "resnet8", "--steps", 2, "--batch-size", 4)
    assert status_of(distill.main, *learn, "--out", tmp_path / "student") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "student" / "last" / "config.json").read_text())
    assert config["class_names"] == list(NAMES) and config["input_size"] == 24
    for way in ("own", "all"):
        asked = (*own, "--data", tmp_path / "images", "--student", "resnet8", "--steps", 2, "--batch-size", 4)
        assert status_of(distill.main, *asked, "--taught-by", way, "--out", tmp_path / way) == 0
    assert status_of(export.main, "--checkpoint", tmp_path / "student" / "last", "--format", "torch-export") == 0
    data = real_images(tmp_path)
    assert status_of(evaluate.main, *own, "--data", f"list:{data}", "--device", "cpu") == 0
    assert last_line(capsys.readouterr().out)["images"] == 10


def real_images(folder: Path) -> Path:
    """A list file of two grey images of every class."""
    lines = []
    for label in range(5):
        for n in range(2):
            name = f"{NAMES[label]}/{n}.png"
            (folder / NAMES[label]).mkdir(exist_ok=True)
            Image.new("RGB", (24, 24), (40 * label + n,) * 3).save(folder / name)
            lines.append(f"{name} {label}")
    file = folder / "test.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.mark.slow
def test_a_federated_run(
    clients: tuple[Path, Path], small_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FedCADO's preset: noise is edited, a client guides its own images, and one student learns from all."""
    file = tmp_path / "federated.toml"
    file.write_text(
        f"""
preset = "fedcado"
[teacher]
clients = ["{clients[0]}", "{clients[1]}"]
[generate]
teaching = "each"
prior = "{small_prior}"
size = 16
steps = 3
noise-edit-steps = 1
count = 12
group = 3
batch = 3
device = "cpu"
[distill]
student = "resnet8"
steps = 2
batch-size = 4
device = "cpu"
[evaluate]
data = "list:{real_images(tmp_path)}"
device = "cpu"
[baselines.joint]
teaching = "joint"
"""
    )
    assert status_of(running.main, file, "--out", tmp_path / "run") == 0, capsys.readouterr().err
    found = last_line(capsys.readouterr().out)
    assert found["images"] == 12 and 0 <= found["accuracy"] <= 1 and set(found["baselines"]) == {"joint"}
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["teacher_architecture"] == "committee" and len(report["teacher_views"]) == 2
    student = json.loads((tmp_path / "run" / "student" / "last" / "config.json").read_text())
    assert student["class_names"] == list(NAMES)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--clients", "a", "b", "--teacher-checkpoint", "c"), "--teacher-checkpoint is of one teacher"),
        (("--clients", "a:nan"), "a weight above 0"),
        (("--teacher-checkpoint", "c", "--teaching", "each"), "--teaching each is of several teachers"),
        (("--clients", "none", "nowhere"), "none"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], why: str) -> None:
    assert status_of(generate.main, *argv, "--out", tmp_path / "x") == 2
    assert why in capsys.readouterr().err


def test_a_plan_of_a_teacher_each_is_refused_by_that_name(
    clients: tuple[Path, Path], small_prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--clients", *clients, "--prior", small_prior, *SMALL, "--out", tmp_path / "x", "--teaching", "each")
    assert status_of(generate.main, *own, "--plan-only") == 2
    assert "--plan-only with --teaching each: its network calls are not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"controls": ["deepinversion"]}, "method 'deepinversion' with several --clients: it goes by one teacher"),
        ({"baselines": {"tried": {"step-trials": 3}}}, "--step-trials with several --clients"),
    ],
)
def test_a_baseline_that_goes_by_one_teacher_is_refused_before_the_first_image(
    tmp_path: Path, own: dict[str, Any], why: str
) -> None:
    file = {"teacher": {"clients": ["a", "b"]}, "generate": {"device": "cpu"}}
    file |= {"distill": {"student": "resnet8", "steps": 2, "device": "cpu"}}
    assert len(read_job(file, tmp_path).variants) == 1
    with pytest.raises(UsageError, match=why):
        read_job({**file, **own}, tmp_path)
