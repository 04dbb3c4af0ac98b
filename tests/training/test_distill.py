"""Distillation as a library function: what it learns, refuses and leaves; and that every setting of it acts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd.config import DistillConfig, leaves
from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.training import step
from dfkd.training.distill import distill, score, split, warm_start
from dfkd.training.losses import CrossEntropy
from dfkd.training.world import World
from dfkd_kernels import soft_kl
from tests.training.small_run import (
    CLASS_NAMES,
    Killed,
    close,
    dies,
    equal,
    equal_states,
    lines,
    network,
    pool,
    run,
    settings,
    teacher,
    weights,
)


def test_a_student_comes_to_agree_with_its_teacher(tmp_path: Path) -> None:
    config = settings(steps=100, batch_size=32, schedule="cosine", lr=0.2, augment="none", held_out=0.2)
    result = run(tmp_path, config, data=pool(200))
    assert result["best_agreement"] >= result["agreement"] > 0.8
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] / 4
    assert (result["steps"], result["images"]) == (100, 3200) and result["seconds"] > 0


def test_it_returns_the_last_student_ready_to_use(tmp_path: Path) -> None:
    config = settings(student="resnet8")
    student = distill(pool(), teacher(), config, tmp_path)
    saved = Classifier.from_pretrained(tmp_path / "last")
    images = pool(3).images
    assert not student.module.training and equal_states(student, saved)
    torch.testing.assert_close(student(images), saved(images))  # channels-last and not: other sums
    assert (saved.architecture, saved.class_names, saved.input_size) == ("resnet8", CLASS_NAMES, 8)
    again = distill(pool(), teacher(), config, tmp_path)  # finished: as it was saved
    assert equal_states(again, saved) and not again.module.training


def test_without_held_out_images_best_is_last(tmp_path: Path) -> None:
    result = run(tmp_path, settings(held_out=0.0))
    assert result["agreement"] is None and result["best_step"] == 12
    assert equal(tmp_path / "last", tmp_path / "best")


def test_the_held_out_images_are_told_by_id_and_of_the_share_asked() -> None:
    ids = torch.arange(1000)
    train, held = split(ids, 0.05)
    assert len(held) == 50 and sorted([*train.tolist(), *held.tolist()]) == list(range(1000))
    shuffled = ids[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert set(shuffled[split(shuffled, 0.05)[1]].tolist()) == set(held.tolist())
    # An image held out of many is held out of any part of them as well, as long as its neighbours in rank are.
    assert set(split(ids, 0.02)[1].tolist()) < set(held.tolist())
    for count, part, wanted in ((100, 0.0, 0), (3, 0.05, 1), (2, 0.5, 1)):
        assert [len(half) for half in split(torch.arange(count), part)] == [count - wanted, wanted]


def test_score_orders_by_agreement_and_then_by_loss() -> None:
    wanted = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    right, sure, wrong = wanted / 2, wanted, -wanted
    assert score(sure, wanted, 4.0) > score(right, wanted, 4.0) > score(wrong, wanted, 4.0)
    assert score(right, wanted, 4.0)[0] == 1 and score(wrong, wanted, 4.0)[0] == 0


def test_what_cannot_work_is_refused_before_it_starts(tmp_path: Path) -> None:
    def renamed(*names: str) -> Classifier:
        return Classifier(teacher().module, names, (0.5,) * 3, (0.2,) * 3, 8)  # type: ignore[arg-type]

    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"student": network(0, classes=4)}, "gives 4 logits: there are 3 class names"),
        (
            {},
            {"student": nn.Sequential(nn.Flatten(), nn.Linear(7, 3))},
            "Sequential, given 4 images of 8 x 8",
        ),
        ({}, {"teacher": renamed("zero", "one")}, "it has 2, the images have 3"),
        ({}, {"teacher": renamed("zero", "two", "one")}, "label 1 is 'two' to the teacher and 'one' in the images"),
        ({}, {"data": pool(1)}, "the data has 1 images"),
        ({"amp": "fp16"}, {}, "fp16 on a CPU"),
        ({"device": "abacus"}, {}, "--device"),
        ({}, {"student": None}, "unknown architecture 'tiny'"),
    ]
    for changes, given, words in cases:
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "out", settings(**changes), **given)
    assert not list(tmp_path.iterdir())


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = teacher()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(UsageError, match="teacher is "):
        run(tmp_path, teacher=other)


def test_a_network_of_ones_own_belongs_to_the_run(tmp_path: Path) -> None:
    run(tmp_path, student=network(0))
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["architecture"] == ""
    run(tmp_path, student=network(0))  # of the same weights: finished
    for other in (network(5), network(0, 8)):  # other weights, other shapes
        with pytest.raises(UsageError, match=r"student is Sequential .* there and Sequential .* here"):
            run(tmp_path, student=other)
    with pytest.raises(UsageError, match=r"student is Sequential .* there and resnet8 here"):
        run(tmp_path, settings(student="resnet8"), student=None)


def test_a_classifier_may_be_the_student(tmp_path: Path) -> None:
    mine = teacher().replace(module=network(0), architecture="mine")
    student = distill(pool(), teacher(), settings(), tmp_path / "classifier", student=mine)
    run(tmp_path / "module", student=network(0))
    assert student.architecture == "mine" and equal(tmp_path / "classifier" / "last", tmp_path / "module" / "last")
    with pytest.raises(UsageError, match="the student's classes are not those"):
        run(tmp_path / "other", student=mine.replace(class_names=("zero", "two", "one")))


def test_a_student_goes_on_from_anothers_weights(tmp_path: Path) -> None:
    run(tmp_path / "first", settings(student="resnet8"), student=None)
    go_on = settings(student="resnet8", steps=2)
    warm = warm_start(tmp_path / "first/last", go_on)
    run(tmp_path / "warm", go_on, student=warm)
    run(tmp_path / "cold", go_on, student=None)
    assert not equal(tmp_path / "warm/last", tmp_path / "cold/last")
    run(tmp_path / "still", settings(student="resnet8", steps=2, lr=0), student=warm_start(warm.source, go_on))
    held = [weights(tmp_path / name)["conv1.weight"] for name in ("still/last", "first/last")]
    assert torch.equal(*held)
    with pytest.raises(UsageError, match=r"student is ThinResNet \w+ there and resnet8 here"):
        run(tmp_path / "warm", go_on, student=None)
    with pytest.raises(UsageError, match="is resnet8, the student wrn16_1"):
        warm_start(tmp_path / "first/last", settings(student="wrn16_1"))


def test_a_plateau_ends_a_run_and_a_resumed_one_at_the_same_step(tmp_path: Path) -> None:
    flat = settings(checkpoint_every=2, lr=1e-5, plateau=2)
    found = run(tmp_path / "whole", flat)
    measured = [line["agreement"] for line in lines(tmp_path / "whole") if "agreement" in line]
    assert (found["ended_by"], found["steps_asked"]) == ("plateau", 12) and found["steps"] == 2 * len(measured) < 12
    assert max(measured[-2:]) <= max(measured[:-2])
    for kill in (1, 3, found["steps"] - 1):
        with pytest.raises(Killed):
            run(tmp_path / str(kill), flat, progress=dies(kill))
        assert run(tmp_path / str(kill), flat)["steps"] == found["steps"]
        assert equal(tmp_path / "whole/last", tmp_path / str(kill) / "last")
        assert lines(tmp_path / "whole") == lines(tmp_path / str(kill))
    assert run(tmp_path / "long", settings())["ended_by"] == "length"


def test_a_plateau_that_cannot_act_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--plateau 3 cannot act: the run has 3 checks"):
        run(tmp_path / "out", settings(checkpoint_every=4, plateau=3))
    with pytest.raises(ValueError, match="--plateau 3 with --held-out 0"):
        settings(plateau=3, held_out=0)


def test_a_loss_may_be_an_object(tmp_path: Path) -> None:
    run(tmp_path / "named", settings(ce_weight=0.5))
    run(tmp_path / "given", losses=[CrossEntropy(0.5)])
    assert equal(tmp_path / "named" / "last", tmp_path / "given" / "last")
    with pytest.raises(UsageError, match=r"loss is .*'weight': 0.5.* there and .*'weight': 0.7.* here"):
        run(tmp_path / "given", losses=[CrossEntropy(0.7)])


def test_the_loss_in_triton_trains_the_same_student_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel is not interpreted here; natively in tests/kernels")
    pytest.importorskip("triton", reason="the kernel needs Triton")
    launches = []
    own = soft_kl._launch
    monkeypatch.setattr(soft_kl, "_launch", lambda *given: launches.append(given) or own(*given))
    for kernels, ce in (("torch", 0.5), ("triton", 0.5)):
        run(tmp_path / kernels, settings(kernels=kernels, ce_weight=ce))
        assert len(launches) == (12 if kernels == "triton" else 0)
    close(tmp_path / "triton/last", tmp_path / "torch/last", 1e-4)  # float32 over 12 steps
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        with pytest.raises(UsageError, match="--kernels triton on cpu"):
            run(tmp_path / "none", settings(kernels="triton"))


# mSARC of networks that have a feature map and no global average.
GRAD_CAMS = {"msarc_weight": 1.0, "msarc_maps": "gradcam", "msarc_teacher_stages": "0", "msarc_student_stages": "0"}
# By setting: another value, and what a run needs for the setting to matter.
OTHER_STUDENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "steps": (14, {}),
    "epochs": (2, {"epochs": 3}),
    "batch_size": (4, {}),
    "optimiser": ("muon", {}),
    "lr": (0.1, {}),
    "muon_lr": (0.01, {"optimiser": "muon"}),
    "beta2": (0.5, {"optimiser": "adamw", "lr": 0.01}),
    "momentum": (0.5, {}),
    "nesterov": (True, {}),
    "weight_decay": (0.1, {}),
    "decay": ("weights", {"weight_decay": 0.1}),
    "schedule": ("cosine", {}),
    "milestones": (("0.25",), {}),
    "gamma": (0.5, {}),
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
    "plateau": (1, {"checkpoint_every": 2, "lr": 1e-5}),
    "amp": ("bf16", {}),
    "seed": (1, {}),
}
# Those that act otherwise, and where a test shows it.
ELSEWHERE = {
    "test_distill": {"student", "kernels", "workers", "device", "cuda_graph", "compile", "on_bad_sample"},
    "test_loop": {"loader", "resume", "checkpoint_every"},
    "test_losses": {"loss"},
    "test_msarc": {"msarc_maps"},
    "test_step": {"sync_bn"},
    "test_logs": {"tensorboard", "wandb"},
    "test_several_teachers": {"taught_by"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """The folder of a run of these settings, which is made once."""
    made: dict[str, Path] = {}

    def of(changes: dict[str, Any]) -> Path:
        if str(changes) not in made:
            made[str(changes)] = tmp_path_factory.mktemp("base")
            run(made[str(changes)], settings(**changes))
        return made[str(changes)]

    return of


@pytest.mark.parametrize("name", OTHER_STUDENT)
def test_another_value_gives_another_student_and_another_run(
    tmp_path: Path, name: str, base: Callable[[dict[str, Any]], Path]
) -> None:
    value, changes = OTHER_STUDENT[name]
    config = settings(**{**changes, name: value})
    run(tmp_path, config)
    assert not equal(base(changes) / "last", tmp_path / "last")
    assert config.identity()[name] != settings(**changes).identity()[name]


def test_every_setting_is_tried_somewhere() -> None:
    tried = [*OTHER_STUDENT, *(name for names in ELSEWHERE.values() for name in names)]
    assert sorted(tried) == sorted(leaves(DistillConfig))


def test_how_a_run_is_computed_reaches_what_computes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfkd.training import distill as module
    from dfkd.training import loop

    given: dict[str, list[Any]] = {"compiled": [], "captured": [], "workers": [], "bad": []}

    def compiled(network: nn.Module, mode: str) -> nn.Module:
        given["compiled"].append(mode)
        return network

    def opened(*words: Any) -> Any:
        given["workers"].append(words[-1])
        return own(*words)

    def open_data(paths: Any, on_bad_sample: str) -> Any:
        given["bad"].append((paths, on_bad_sample))
        return pool()

    own = loop.open_source
    monkeypatch.setattr(loop, "open_source", opened)
    monkeypatch.setattr(module, "open_data", open_data)
    monkeypatch.setattr(module, "check_training", lambda *words: None)
    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(step, "compiled", compiled)
    monkeypatch.setattr(step, "Captured", lambda descent: given["captured"].append(descent) or descent)
    run(tmp_path / "one", settings(workers=0, loader="torch"), data="a folder")
    more = {"compile": "default", "cuda_graph": True, "workers": 1, "on_bad_sample": "skip"}
    run(tmp_path / "other", settings(loader="torch", **more), data=["a", Path("b")])
    assert given["compiled"] == ["off", "off", "default", "default"] and len(given["captured"]) == 1
    assert given["workers"] == [0, 1]
    assert given["bad"] == [("a folder", "fail"), (["a", Path("b")], "skip")]
    with pytest.raises(UsageError, match="--device cuda:99 is absent"):
        run(tmp_path / "absent", settings(device="cuda:99"))


def test_a_world_decides_the_device(tmp_path: Path) -> None:
    """A command has joined the processes, and chosen the device, before."""
    run(tmp_path, settings(device="cuda:99"), world=World(torch.device("cpu")))
    assert all(value.isfinite().all() for value in weights(tmp_path / "last").values())


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"amp": "fp16", "ema": 0.9}, {"amp": "bf16"}, {"compile": "reduce-overhead"}])
def test_precisions_and_compiled_networks_train_on_a_gpu(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = run(tmp_path, settings(device="cuda", steps=60, **changes))
    assert result["skipped"] < 60 and all(value.isfinite().all() for value in weights(tmp_path / "last").values())


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"amp": "bf16", "clip_norm": 1.0}, {"compile": "default", "mix": "cutmix"}])
def test_a_captured_step_trains_the_same_student_but_for_rounding(tmp_path: Path, changes: dict[str, Any]) -> None:
    for graph in (False, True):
        run(tmp_path / str(graph), settings(device="cuda", cuda_graph=graph, warmup=3, **changes))
    close(tmp_path / "True/last", tmp_path / "False/last", 1e-2 if "amp" in changes else 1e-3)
