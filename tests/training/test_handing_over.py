"""What a training returns knows its run: saved elsewhere, its model card tells of it."""

from pathlib import Path

from dfkd.teachers import Classifier
from dfkd.training.distill import distill
from dfkd.training.teacher import train_teacher
from tests.training.small_run import pool, settings, splits, teacher, teacher_settings


def test_a_student_and_a_teacher_bring_their_cards(tmp_path: Path) -> None:
    for _ in range(2):  # trained, and finished before
        config = settings(student="resnet8", steps=2)
        distill(pool(), teacher(), config, tmp_path / "student").save_pretrained(tmp_path / "handed")
        card = (tmp_path / "handed/README.md").read_text()
        assert "| teacher | tiny " in card and "temperature 4.0" in card
        assert Classifier.from_pretrained(tmp_path / "handed").class_names == ("zero", "one", "two")
    trained = train_teacher(splits(), teacher_settings(steps=2), tmp_path / "teacher", architecture="resnet8")
    trained.save_pretrained(tmp_path / "shown")
    assert "| | accuracy on 15 images of the test split of " in (tmp_path / "shown/README.md").read_text()
