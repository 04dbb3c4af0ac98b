"""A student of several teachers: by those that know an image's class, or by all of them."""

import pytest
import torch

from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee
from dfkd.training.distill import distill, logits_of
from dfkd.training.losses import Objective, OwnTeachers
from tests.training.small_run import network, pool, settings

NAMES = ("zero", "one", "two", "three")
FED = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 8)


def committee() -> Committee:
    first = Classifier(network(1, 8).eval(), NAMES[:3], *FED)
    second = Classifier(network(2, 8).eval(), NAMES[1:], *FED)
    return Committee.of((first, second), (1.0, 2.0), ("first", "second"))


def images() -> Pool:
    made = pool()
    return Pool(made.images, torch.arange(len(made.labels)) % 4, made.ids, NAMES)


def test_the_loss_is_the_divergence_from_those_that_know_the_class() -> None:
    teachers, labels = committee().freeze(), torch.tensor([0, 1, 3])
    pixels, student = torch.rand(3, 3, 8, 8), network(5, 4, 4).eval()
    loss = OwnTeachers(temperature=2.0, committee=teachers)
    found = Objective(teachers.module, student, [loss], torch.no_grad)(student, pixels, labels)
    p, q = ((member.classifier.logits(pixels) / 2).softmax(1) for member in teachers.members)
    wanted = torch.zeros(3, 4)
    wanted[0, :3] = p[0]
    wanted[1, :3] += p[1] / 3
    wanted[1, 1:] += 2 * q[1] / 3
    wanted[2, 1:] = q[2]
    answers = (student(pixels) / 2).log_softmax(1)
    divergence = torch.where(wanted > 0, wanted * (wanted.clamp_min(1e-30).log() - answers), 0.0).sum()
    assert torch.allclose(found, 4 * divergence / 3, atol=1e-5) and "kl_own_teachers" in loss.describe()


@pytest.mark.parametrize("taught_by", ["own", "all"])
def test_a_student_of_all_classes(tmp_path, taught_by) -> None:
    teachers = committee()
    student = distill(images(), teachers, settings(steps=6, taught_by=taught_by, student="resnet8"), tmp_path)
    assert type(student) is Classifier and student.class_names == NAMES
    assert Classifier.from_pretrained(tmp_path / "last").class_names == NAMES


def test_the_two_ways_teach_otherwise(tmp_path) -> None:
    ways = [distill(images(), committee(), settings(steps=6, taught_by=way, student="resnet8"), tmp_path / way)
            for way in ("own", "all")]  # fmt: skip
    first, second = (way.state_dict() for way in ways)
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(UsageError, match="taught-by"):
        distill(images(), committee(), settings(steps=6, taught_by="all", student="resnet8"), tmp_path / "own")


def test_held_out_images_are_judged_by_those_that_know_them() -> None:
    teachers, made = committee().freeze(), images()
    answers = logits_of(teachers, made.images, made.labels)
    for label, answer in zip(made.labels.tolist(), answers.argmax(1).tolist(), strict=True):
        assert any(answer in member.classes for member in teachers.knowing(label))
    assert answers[made.labels == 0][:, 3].max() < -20  # only the first knows "zero", and it knows no "three"


def test_a_mixture_has_no_teacher() -> None:
    with pytest.raises(ValueError, match="--taught-by own with --mix cutmix"):
        settings(taught_by="own", mix="cutmix")
