"""Training of a teacher: it learns, follows its settings, and reads real images as late and as seldom as it can."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.training.teacher import SAMPLE, accuracy, statistics, train_teacher
from tests.training.small_run import (
    dies,
    equal,
    equal_states,
    lines,
    pool,
    run_teacher,
    splits,
    teacher_settings,
)

NAMES = ("dark", "light")


def dark_and_light(count: int = 70) -> Pool:
    """Noisy 8x8 images, the odd ones lighter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Pool(images + (labels * 120).to(torch.uint8).view(-1, 1, 1, 1), labels, torch.arange(count), NAMES)


def flipped(data: Pool) -> Pool:
    return Pool(data.images, 1 - data.labels, data.ids, NAMES)


def test_it_learns_and_is_tested_once_at_the_end(tmp_path: Path) -> None:
    data = dark_and_light()
    config = teacher_settings(steps=30, batch_size=16, schedule="onecycle")
    given = {"train": data, "validation": data, "test": flipped(data)}
    teacher = train_teacher(given, config, tmp_path, architecture="resnet8")
    assert not teacher.module.training and accuracy(teacher, data) == 1.0
    assert accuracy(teacher, Pool(data.images, torch.zeros(70, dtype=torch.int64), data.ids, NAMES)) == 0.5
    saved = Classifier.from_pretrained(tmp_path)
    assert equal_states(saved, teacher) and saved.class_names == NAMES
    assert saved.mean == teacher.mean == statistics(data)[0] and saved.input_size == 8
    found = run_teacher(tmp_path, config, data=given, progress=dies(0))
    assert (found["accuracy"], found["validation_accuracy"], found["test_images"]) == (0.0, 1.0, 70)
    assert sum("validation_accuracy" in line for line in lines(tmp_path)) == 15


def test_validation_on_the_way_takes_no_more_images_than_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfkd.training.teacher.ROWS", 8)
    data, counts = dark_and_light(), list[int]()

    class Counted(Pool):
        def read(self, positions: torch.Tensor) -> torch.Tensor:
            counts.append(len(positions))
            return super().read(positions)

    validation = Counted(data.images, data.labels, data.ids, NAMES)
    given = {"train": data, "validation": validation, "test": data}
    config = teacher_settings(steps=3, batch_size=16, checkpoint_every=1)
    train_teacher(given, config, tmp_path, architecture="resnet8")
    assert (
        counts[-2 * 9 - 4 :] == [8, 8] * 2 + [*[8] * 8, 6] * 2
    )  # 16 at two checks; 70 at the last, and for the result


def test_statistics_are_those_of_the_pixels() -> None:
    data = dark_and_light()
    pixels = data.images.double() / 255
    mean, std = statistics(data)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "muon"},
        {"augment": "crop-altflip"},
        {"label_smoothing": 0.3},
        {"decay": "all", "weight_decay": 0.1},
        {"nesterov": False},
        {"seed": 1},
    ],
)
def test_another_value_gives_another_teacher(tmp_path: Path, changes: dict[str, Any]) -> None:
    run_teacher(tmp_path / "one", teacher_settings(weight_decay=0.1))
    run_teacher(tmp_path / "two", teacher_settings(**{"weight_decay": 0.1, **changes}))
    assert not equal(tmp_path / "one", tmp_path / "two")


def test_a_test_that_fails_costs_no_network(tmp_path: Path) -> None:
    class Damaged(Pool):
        """Its last images cannot be read once the training is over."""

        whole = True

        def read(self, positions: Tensor) -> Tensor:
            if not self.whole and len(positions) > SAMPLE:
                raise UsageError("cannot read image 40")
            return super().read(positions)

    data = splits(60)
    testing = Damaged(**{key: getattr(pool(60), key) for key in ("images", "labels", "ids", "class_names")})
    testing.whole = False
    with pytest.raises(UsageError, match="cannot read image 40"):
        run_teacher(tmp_path, data={**data, "test": testing})
    trained = Classifier.from_pretrained(tmp_path)
    testing.whole = True
    found = run_teacher(tmp_path, data={**data, "test": testing}, progress=dies(0))  # the test alone is repeated
    assert found["test_images"] == 60 and equal_states(Classifier.from_pretrained(tmp_path), trained)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"test": None}, "split 'test' is missing: there are train, validation"),
        ({"validation": pool(0)}, "split 'validation' is empty"),
        ({"test": dark_and_light()}, "split 'test' has other classes: it has dark, light, train has zero, one, two"),
    ],
)
def test_splits_that_do_not_fit_are_refused_before_the_training(
    tmp_path: Path, changed: dict[str, Pool | None], words: str
) -> None:
    data = {split: images for split, images in {**splits(), **changed}.items() if images is not None}
    with pytest.raises(UsageError, match=words):
        run_teacher(tmp_path, data=data)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_cannot_work_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown architecture 'resnet9'"):
        run_teacher(tmp_path / "out", architecture="resnet9")
    with pytest.raises(UsageError, match="--amp fp16 on a CPU"):
        run_teacher(tmp_path / "out", teacher_settings(amp="fp16"))
    assert not list(tmp_path.iterdir())
    run_teacher(tmp_path)
    with pytest.raises(UsageError, match="architecture is resnet8 there and resnet20 here"):
        run_teacher(tmp_path, architecture="resnet20")
    with pytest.raises(UsageError, match=r"data is .* there and digits-on-photos here"):
        run_teacher(tmp_path, data="digits-on-photos")  # before the images are made
