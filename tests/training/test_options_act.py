"""Every option of a distillation run acts: another value gives another student, or has the effect that is its purpose.

A field of DistillSettings that is in none of the tables here fails the first test.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dfkd.training import step, train
from dfkd.training.checks import check_computation
from dfkd.training.normalisation import synchronised
from dfkd.training.settings import COMPUTATION, DistillSettings
from dfkd.training.world import World
from dfkd.errors import UsageError
from tests.training.small_run import network, settings, teacher
from tests.training.test_train import equal, run

# mSARC of networks that have a feature map and no global average.
GRAD_CAMS: dict[str, object] = {
    "msarc_weight": 1.0,
    "msarc_maps": "gradcam",
    "msarc_teacher_stages": ("0",),
    "msarc_student_stages": ("0",),
}

# By field: another value, and what a run needs for the field to matter.
OTHER_STUDENT: dict[str, tuple[object, dict[str, object]]] = {
    "steps": (14, {}),
    "epochs": (2, {"epochs": 3}),
    "batch_size": (4, {}),
    "lr": (0.1, {}),
    "momentum": (0.5, {}),
    "weight_decay": (0.1, {}),
    "schedule": ("cosine", {}),
    "milestones": (("0.25",), {}),
    "warmup": (4, {}),
    "temperature": (2.0, {}),
    "ce_weight": (1.0, {}),
    "msarc_weight": (2.0, GRAD_CAMS),
    "msarc_teacher_stages": (("2",), GRAD_CAMS),
    "msarc_student_stages": (("1",), GRAD_CAMS),
    "augment": ("affine", {}),
    "mix": ("mixup", {}),
    "mix_alpha": (0.2, {"mix": "mixup"}),
    "clip_norm": (1e-3, {}),
    "ema": (0.9, {}),
    "held_out": (0.3, {}),
    "amp": ("bf16", {}),
    "seed": (1, {}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, object]], Path]:
    """The folder of a run of these settings, which is made once; a second one has the same student."""
    made: dict[str, Path] = {}

    def of(base: dict[str, object]) -> Path:
        if str(base) not in made:
            made[str(base)] = tmp_path_factory.mktemp("base")
            run(made[str(base)], settings(**base))
        return made[str(base)]

    return of


@pytest.mark.parametrize("name", OTHER_STUDENT)
def test_another_value_gives_another_student(
    tmp_path: Path, name: str, bases: Callable[[dict[str, object]], Path]
) -> None:
    value, base = OTHER_STUDENT[name]
    run(tmp_path, settings(**{**base, name: value}))
    assert not equal(bases(base), tmp_path)


def test_equal_values_give_equal_students(tmp_path: Path, bases: Callable[[dict[str, object]], Path]) -> None:
    run(tmp_path, settings())
    assert equal(bases({}), tmp_path)


def said(out: Path, **changes: object) -> list[str]:
    """What a run tells its user."""
    lines: list[str] = []
    options = settings(**{"steps": 2, **changes})
    train.distill(tiny_pool(), teacher(), network(0), options, out, architecture="tiny", say=lines.append)
    return lines


def tiny_pool() -> Any:
    from tests.training.small_run import pool

    return pool()


def checkpoint_every(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    for every, checks in ((3, 4), (6, 2)):
        run(tmp_path / str(every), settings(checkpoint_every=every))
        assert (tmp_path / str(every) / "log.jsonl").read_text().count("agreement") == checks


def msarc_maps(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    assert "mSARC: Grad-CAMs of 0 (teacher) and 0 (student)" in said(tmp_path, **GRAD_CAMS)
    for maps in ("both", "cam"):
        named = GRAD_CAMS if maps == "both" else {"msarc_weight": 1.0}
        with pytest.raises(UsageError, match="the teacher has no class activation maps"):
            run(tmp_path / maps, settings(**{**named, "msarc_maps": maps}))


def sync_bn(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    gpus = World(torch.device("cuda"), 0, 2)
    on, off = (synchronised(network(0), wanted, gpus) for wanted in ("on", "off"))
    assert [type(one) for one in on.modules()] != [type(one) for one in off.modules()]


def device(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--device cuda:99 is absent"):
        run(tmp_path, settings(device="cuda:99"))
    assert next(run(tmp_path, settings(device="cpu")).student.module.parameters()).device.type == "cpu"


def kernels(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    assert "kernels: torch (as asked)" in said(tmp_path, kernels="torch")
    taken = []
    own = step.distillation_loss
    patch.setattr(step, "distillation_loss", lambda *given: taken.append(given[-1]) or own(*given[:-1], "torch"))
    patch.setattr(train, "choose_kernels", lambda wanted, device: type("Choice", (), {"name": wanted, "why": ""}))
    run(tmp_path / "other", settings(kernels="triton"))
    assert set(taken) == {"triton"}


def compile(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    modes = []
    patch.setattr(step, "compiled", lambda module, mode, rows: modes.append(mode) or module)
    for mode in ("off", "default"):
        patch.setattr(train, "check", lambda *given: None)
        run(tmp_path / mode, settings(compile=mode))
    assert modes == ["off", "off", "default", "default"]


def cuda_graph(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    captured = []
    patch.setattr(step, "Captured", lambda descent, rows: captured.append(rows) or descent)
    patch.setattr(train, "check", lambda *given: None)
    for on in (False, True):
        run(tmp_path / str(on), settings(cuda_graph=on))
    assert captured == [8]


def cache_logits(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    tables = []
    own = train.logits_table
    patch.setattr(train, "logits_table", lambda *given: tables.append(given) or own(*given))
    for wanted in ("off", "on"):
        run(tmp_path / wanted, settings(cache_logits=wanted, augment="none"))
    assert len(tables) == 1


def loader(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("resident", "torch"):
        assert any(line.startswith(f"loader: {name} (as asked") for line in said(tmp_path / name, loader=name))


def workers(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    given = []
    own = train.open_source
    patch.setattr(train, "open_source", lambda *words: given.append(words[-1]) or own(*words))
    for count in (0, 1):
        run(tmp_path / str(count), settings(loader="torch", workers=count))
    assert given == [0, 1]


def on_bad_sample(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """What it does to damaged shards: tests/test_shard_damage.py."""
    from dfkd.cli import distill as cli

    opened = []

    def open_folder(path: Path, wanted: str) -> Any:
        opened.append(wanted)
        raise UsageError("enough")

    patch.setattr(cli, "open_folder", open_folder)
    for wanted in ("fail", "skip"):
        paths = {"data": tmp_path, "student": "resnet8", "out": tmp_path / "out"}
        with pytest.raises(UsageError, match="enough"):
            cli.run(cli.Options(**paths, device="cpu", on_bad_sample=wanted))
    assert opened == ["fail", "skip"]


class Writer:
    """Stands in for tensorboard's SummaryWriter and for a run of wandb."""

    def __init__(self, *given: object, **named: object) -> None:
        self.given, self.named, self.told, self.closed = given, named, [], False  # type: ignore[var-annotated]

    def add_scalar(self, name: str, value: float, at: int) -> None:
        self.told.append((at, name, value))

    def log(self, measured: dict[str, float], step: int) -> None:
        self.told += [(step, name, value) for name, value in measured.items()]

    def close(self) -> None:
        self.closed = True

    finish = close


def installed(patch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    for part in {name, name.rpartition(".")[2]}:
        module = ModuleType(part)
        module.__spec__ = ModuleSpec(part, None)
        module.__dict__.update(content)
        patch.setitem(sys.modules, part, module)


def numbers(out: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(line["step"], name, value) for line in lines for name, value in line.items() if name != "step"]


def told_alike(tmp_path: Path, patch: pytest.MonkeyPatch, option: dict[str, object], made: list[Writer]) -> None:
    """The log has the same numbers as the other; a stopped run opens it again, and closes it either way."""
    from tests.training.test_train import Killed

    out = tmp_path / "out"
    options = settings(checkpoint_every=3, **option)
    with pytest.raises(Killed):
        run(out, options, kill_after=7)
    run(out, options)
    assert len(made) == 2 and all(writer.closed for writer in made)
    kept = [line for line in made[0].told if line[0] <= 6]
    assert kept + made[1].told == numbers(out) and {name for _, name, _ in made[1].told} >= {"loss", "agreement"}
    run(tmp_path / "without", settings())
    assert len(made) == 2


def tensorboard(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    made: list[Writer] = []

    def writer(*given: object, **named: object) -> Writer:
        made.append(Writer(*given, **named))
        return made[-1]

    installed(patch, "torch.utils.tensorboard", SummaryWriter=writer)
    told_alike(tmp_path, patch, {"tensorboard": True}, made)
    assert [one.given for one in made] == [(str(tmp_path / "out" / "tensorboard"),)] * 2
    assert [one.named for one in made] == [{"purge_step": None}, {"purge_step": 7}]


def wandb(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    made: list[Writer] = []

    def init(**named: object) -> Writer:
        made.append(Writer(**named))
        return made[-1]

    installed(patch, "wandb", init=init)
    told_alike(tmp_path, patch, {"wandb": "digits"}, made)
    assert made[0].named == made[1].named  # the same run goes on
    assert (made[0].named["project"], made[0].named["name"], made[0].named["resume"]) == ("digits", "out", "allow")

    def offline(**named: object) -> Writer:
        raise ConnectionError("no route\nat all")

    installed(patch, "wandb", init=offline)
    with pytest.raises(UsageError, match=r"--wandb digits could not start: ConnectionError: no route\. .*WANDB_MODE"):
        run(tmp_path / "offline", settings(wandb="digits"))


def resume(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, settings())
    assert run(tmp_path, settings(), kill_after=0).seconds == first.seconds
    calls: list[int] = []
    train.distill(
        tiny_pool(), teacher(), network(0), settings(resume=False), tmp_path,
        architecture="tiny", watch=lambda done, total: calls.append(done),
    )  # fmt: skip
    assert len(calls) == 13  # before the first step and after each


EFFECTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    function.__name__: function
    for function in (
        *(checkpoint_every, msarc_maps, sync_bn, device, kernels, compile, cuda_graph, cache_logits, loader, workers),
        *(on_bad_sample, tensorboard, wandb, resume),
    )
}


def test_every_option_is_tried_here() -> None:
    names = {field.name for field in fields(DistillSettings)}
    assert names == OTHER_STUDENT.keys() | EFFECTS.keys()
    assert not OTHER_STUDENT.keys() & {*EFFECTS, *COMPUTATION}


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_has_its_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    EFFECTS[name](tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [name for name in OTHER_STUDENT if name not in ("steps", "epochs")])
def test_what_changes_the_student_is_part_of_the_run(tmp_path: Path, name: str) -> None:
    from dfkd.training.identity import settings_of

    value, base = OTHER_STUDENT[name]
    one, other = (settings_of(settings(**{**base, **more})) for more in ({}, {name: value}))
    assert one[name] != other[name] and name not in COMPUTATION


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_log_whose_package_is_absent_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = {"tensorboard": True} if package == "tensorboard" else {"wandb": "digits"}
    with pytest.raises(UsageError, match=f"--{package} needs the package {package}: it is not installed. pip install"):
        check_computation(settings(**wanted), World(torch.device("cpu")))


def test_tensorboards_own_files_hold_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, settings(tensorboard=True, checkpoint_every=3))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    told = [(event.step, event.value) for event in found.Scalars("loss")]
    logged = [(at, value) for at, name, value in numbers(tmp_path) if name == "loss"]
    assert [at for at, _ in told] == [at for at, _ in logged]
    assert [value for _, value in told] == pytest.approx([value for _, value in logged], rel=1e-6)  # float32 there
