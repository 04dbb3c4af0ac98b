import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dfkd.training.settings import DistillSettings
from dfkd.training.train import DistillResult, distill
from dfkd.errors import UsageError
from dfkd.data.loader import dali
from dfkd_kernels import soft_kl
from tests.training.small_run import network, pool, settings, teacher


class Killed(Exception):
    pass


def run(out: Path, options: DistillSettings, kill_after: int | None = None, **changes: object) -> DistillResult:
    """A run that dies once ``kill_after`` more steps were done."""
    calls = 0

    def watch(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if kill_after is not None and calls > kill_after:  # the first call comes before the first step
            raise Killed

    given = {"data": pool(), "teacher": teacher(), "student": network(0), **changes}
    return distill(**given, settings=options, out=out, architecture="tiny", watch=watch)  # type: ignore[arg-type]


def equal(one: Path, other: Path, name: str = "last") -> bool:
    mine, theirs = (load_file(path / name / "model.safetensors") for path in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_student_comes_to_agree_with_its_teacher(tmp_path: Path) -> None:
    options = settings(steps=200, batch_size=32, schedule="cosine", lr=0.1, augment="none", held_out=0.2)
    result = run(tmp_path, options, data=pool(200))
    assert result.agreement is not None and result.agreement > 0.8
    assert result.best_agreement is not None and result.best_agreement >= result.agreement
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 4
    assert result.steps == 200 and result.images == 6400 and result.seconds > 0


RICH = {"ema": 0.9, "mix": "both", "checkpoint_every": 4, "warmup": 2}


@pytest.mark.parametrize("changes", [{"checkpoint_every": 3}, RICH, {"ce_weight": 1.0, "amp": "bf16"}])
@pytest.mark.parametrize("killed", [1, 5, 10])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, changes: dict[str, object], killed: int) -> None:
    options = settings(**changes)
    whole = run(tmp_path / "whole", options)
    with pytest.raises(Killed):
        run(tmp_path / "killed", options, kill_after=killed)
    resumed = run(tmp_path / "killed", options, student=network(99))
    assert equal(tmp_path / "whole", tmp_path / "killed") and equal(tmp_path / "whole", tmp_path / "killed", "best")
    assert (resumed.agreement, resumed.best_step) == (whole.agreement, whole.best_step)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_all_loaders_train_the_same_student(tmp_path: Path) -> None:
    run(tmp_path / "resident", settings(loader="resident"))
    run(tmp_path / "torch", settings(loader="torch", workers=0))
    assert equal(tmp_path / "resident", tmp_path / "torch")
    if dali.installed():
        run(tmp_path / "dali", settings(loader="dali"))
        mine, theirs = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("dali", "torch"))
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)  # normalised in another order


@pytest.mark.parametrize("options", [{}, {"ce_weight": 1.0}])
def test_the_loss_in_triton_trains_the_same_student_but_for_rounding(
    tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel is not interpreted here; natively in tests/kernels")
    launches = []
    own = soft_kl._launch
    monkeypatch.setattr(soft_kl, "_launch", lambda *given: launches.append(given) or own(*given))
    run(tmp_path / "torch", settings(**options))
    assert not launches  # auto on a CPU
    result = run(tmp_path / "triton", settings(kernels="triton", **options))
    assert len(launches) == result.steps and {given[2] for given in launches} == {4.0}
    assert {given[4] for given in launches} == {options.get("ce_weight", 0.0)}
    mine, theirs = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("triton", "torch"))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)  # float32 over 12 steps


def test_kernels_that_cannot_run_are_refused_and_may_change_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, settings(checkpoint_every=1), kill_after=2)
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UsageError, match="--kernels triton on cpu"):
            run(tmp_path, settings(checkpoint_every=1, kernels="triton"))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(tmp_path, settings(checkpoint_every=1, kernels="torch")).steps == 12


def test_a_run_follows_its_seed_and_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    run(tmp_path / "one", settings(seed=1))
    student = network(0)
    state = torch.get_rng_state()
    run(tmp_path / "two", settings(seed=2), student=student)
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(tmp_path / "one", tmp_path / "two")


def test_every_training_image_is_shown_once_per_epoch(tmp_path: Path) -> None:
    assert run(tmp_path, settings(epochs=3)).images == 3 * 36  # 40 less 4 held out


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path, settings())
    again = run(tmp_path, settings(), kill_after=0, student=network(99))
    assert (again.agreement, again.best_step, again.seconds) == (first.agreement, first.best_step, first.seconds)
    for mine, theirs in zip(first.student.module.parameters(), again.student.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_other_settings_teacher_or_data_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, settings())
    with pytest.raises(UsageError, match=r"lr is 0\.05 there and 0\.1 here; temperature is 4\.0 there and 2\.0 here"):
        run(tmp_path, settings(lr=0.1, temperature=2.0))
    with pytest.raises(UsageError, match="data is "):
        run(tmp_path, settings(), data=pool(41))
    with torch.no_grad():
        other = teacher()
        next(other.module.parameters()).add_(1)
    with pytest.raises(UsageError, match="teacher is "):
        run(tmp_path, settings(), teacher=other)
    run(tmp_path, settings(lr=0.1, resume=False))
    assert run(tmp_path, settings(lr=0.1, workers=0, loader="torch"), kill_after=0).steps == 12


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    options = settings(lr=1e30, momentum=0.0, checkpoint_every=1, augment="none")
    with pytest.raises(UsageError) as stop:
        run(tmp_path, options)
    text = str(stop.value)
    assert "the loss of step 2 is nan" in text or "the loss of step 2 is inf" in text
    assert "images of step 2: " in text and str(tmp_path / "checkpoint.pt") in text


def test_the_average_of_the_weights_replaces_them(tmp_path: Path) -> None:
    run(tmp_path / "plain", settings())
    run(tmp_path / "ema", settings(ema=0.9))
    assert not equal(tmp_path / "plain", tmp_path / "ema")


def test_without_held_out_images_best_is_last(tmp_path: Path) -> None:
    result = run(tmp_path, settings(held_out=0.0))
    assert result.agreement is None and result.best_step == 12
    plain = load_file(tmp_path / "last" / "model.safetensors")
    assert all(
        torch.equal(plain[key], value) for key, value in load_file(tmp_path / "best" / "model.safetensors").items()
    )


def test_what_cannot_work_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the student has 4 classes and the images 3"):
        run(tmp_path, settings(), student=network(0, classes=4))
    with pytest.raises(UsageError, match="it has 2, the images have 3"):
        run(tmp_path, settings(), teacher=_renamed(("zero", "one")))
    with pytest.raises(UsageError, match="label 1 is 'two' to the teacher and 'one' in the images"):
        run(tmp_path, settings(), teacher=_renamed(("zero", "two", "one")))
    with pytest.raises(UsageError, match="fp16 on a CPU"):
        run(tmp_path, settings(amp="fp16"))
    with pytest.raises(UsageError, match="--device"):
        run(tmp_path, settings(device="abacus"))
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, settings())
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"checkpoint\.pt is damaged"):
        run(tmp_path, settings())


def _renamed(names: tuple[str, ...]) -> object:
    from dataclasses import replace

    return replace(teacher(), class_names=names)
