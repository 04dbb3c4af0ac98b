"""Several teachers as one: classes by name, sizes and weights of each, and who answers about an image."""

import pytest
import torch

from dfkd.config import DistillCommand, GenerateCommand, TeacherConfig
from dfkd.errors import UsageError
from dfkd.teachers import Classifier, load_teacher
from dfkd.teachers.committee import Committee
from tests.synthesis.small_networks import classifier


def members() -> tuple[Classifier, Classifier]:
    """One of zero, one, two at 8 pixels, and one of two, three, four at 12."""
    return classifier(0), classifier(3, size=12).replace(class_names=("two", "three", "four"))


def test_the_mean_over_those_that_know_a_class() -> None:
    first, second = members()
    committee = Committee.of((first, second), weights=(1.0, 3.0))
    assert committee.class_names == ("zero", "one", "two", "three", "four") and committee.input_size == 12
    images = torch.rand(4, 3, 12, 12)
    p, q = (one.logits(images) for one in (first, second))
    p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
    wanted = torch.stack([p[:, 0], p[:, 1], (p[:, 2] + 3 * q[:, 0]) / 4, q[:, 1], q[:, 2]], 1)
    assert torch.allclose(committee.logits(images), wanted, atol=1e-6)
    assert torch.allclose(committee.tried()(images), wanted, atol=1e-6)


def test_who_answers_about_an_image_whose_class_is_known() -> None:
    first, second = members()
    committee = Committee.of((first, second), weights=(1.0, 3.0))
    images, labels = torch.rand(3, 3, 12, 12), torch.tensor([0, 2, 4])
    assert committee.shares(labels).tolist() == [[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]]
    logits = [one.logits(images) for one in (first, second)]
    told = committee.told(logits, labels, temperature=2.0)
    p, q = ((one / 2).softmax(1) for one in logits)
    zero = torch.zeros(3)
    wanted = torch.stack(
        [
            torch.stack([p[0, 0], p[0, 1], p[0, 2], zero[0], zero[0]]),
            torch.stack([p[1, 0] / 4, p[1, 1] / 4, p[1, 2] / 4 + 0.75 * q[1, 0], 0.75 * q[1, 1], 0.75 * q[1, 2]]),
            torch.stack([zero[0], zero[0], q[2, 0], q[2, 1], q[2, 2]]),
        ]
    )
    assert torch.allclose(told, wanted, atol=1e-6) and torch.allclose(told.sum(1), torch.ones(3))
    sure = committee.label_probability(images, labels)
    assert torch.allclose(sure, committee.told(logits, labels).gather(1, labels[:, None])[:, 0])
    assert [member.class_names for member in (m.classifier for m in committee.knowing(2))] == [
        ("zero", "one", "two"),
        ("two", "three", "four"),
    ]


def test_a_digest_of_all_members_and_weights() -> None:
    first, second = members()
    digests = {
        Committee.of((first, second)).digest(),
        Committee.of((second, first)).digest(),
        Committee.of((first, second), weights=(1, 2)).digest(),
        Committee.of((first,)).digest(),
        Committee.of((classifier(1), second)).digest(),
    }
    assert len(digests) == 5 and Committee.of(members()).digest() in digests


def test_one_member_is_that_teacher() -> None:
    first, _ = members()
    alone, images = Committee.of((first,)), torch.rand(2, 3, 8, 8)
    assert torch.allclose(alone.logits(images).softmax(1), first.logits(images).softmax(1), atol=1e-6)


def test_a_student_is_fed_what_the_committee_is_and_is_a_classifier_of_its_own(tmp_path) -> None:
    committee = Committee.of(members())
    student = committee.replace(module=torch.nn.Flatten(), architecture="flat")
    assert type(student) is Classifier and student.class_names == committee.class_names and student.input_size == 12
    with pytest.raises(UsageError, match="several teachers cannot be saved as one"):
        committee.save_pretrained(tmp_path)


def test_what_cannot_be_a_committee_is_refused() -> None:
    first, second = members()
    with pytest.raises(UsageError, match=r"weight 0"):
        Committee.of((first, second), weights=(1, 0))
    with pytest.raises(UsageError, match="classes 'two' and 'Two'"):
        Committee.of((first, second.replace(class_names=("Two", "three", "four"))))
    with pytest.raises(UsageError, match="0 teachers"):
        Committee.of(())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"clients": ("a", "b"), "teacher_checkpoint": "c"}, "--teacher-checkpoint is of one teacher"),
        ({"clients": ("a", "b"), "teacher_mean": (0, 0, 0)}, "--teacher-mean is of one teacher"),
        ({"clients": ("a:0", "b")}, "a weight above 0"),
        ({"clients": ("a:-1",)}, "a weight above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, why) -> None:
    with pytest.raises(ValueError, match=why):
        TeacherConfig.of(**given)


def test_what_acts_with_several_teachers_alone() -> None:
    with pytest.raises(ValueError, match="--teaching each is of several teachers"):
        GenerateCommand.of(out="x", teaching="each")
    with pytest.raises(ValueError, match="--taught-by own is of several teachers"):
        DistillCommand.of(out="x", data=("y",), student="resnet8", epochs=1, taught_by="own")


def test_a_client_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path / "none")):
        load_teacher(TeacherConfig.of(clients=(str(tmp_path / "none"),)))


def test_weights_and_sources_of_clients() -> None:
    assert TeacherConfig.client("runs/a:2.5") == ("runs/a", 2.5)
    assert TeacherConfig.client("timm:resnet18") == ("timm:resnet18", 1.0)
    assert TeacherConfig.client("runs/a") == ("runs/a", 1.0)
