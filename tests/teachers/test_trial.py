"""What a network may answer: logits in the forms that are clear, and a reason by name for every other."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.teachers.trial import Logits

NAMES = ("a", "b", "c")
Heads = namedtuple("Heads", "aux logits")


class Net(nn.Module):
    """Logits of the mean colour, shown to `answer`: what the network makes of them."""

    def __init__(self, answer=lambda logits: logits):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        self.answer = answer
        with torch.no_grad():
            self.body[3].weight.copy_(torch.tensor([[8.0, -4, 1], [-3, 7, 2], [1, 1, -5]]))

    def forward(self, x):
        return self.answer(self.body(x))


def classifier(answer=lambda logits: logits, names=NAMES, module=None) -> Classifier:
    return Classifier(module or Net(answer), names, (0.5,) * 3, (0.25,) * 3, 6)


CLEAR = {
    "maps": lambda y: y[:, :, None, None],
    "tuple": lambda y: (torch.zeros(len(y), 64, 2, 2), y),
    "list": lambda y: [y, torch.zeros(len(y), 7)],
    "one": lambda y: (y,),
    "dict": lambda y: {"features": torch.zeros(len(y), 9), "out": y},
    "dict with logits": lambda y: {"aux": y * 0, "logits": y},
    "named tuple": lambda y: Heads(y * 0, y),
    "half": torch.Tensor.half,
    "log-probabilities": lambda y: y.log_softmax(1),
}


@pytest.mark.parametrize("form", CLEAR)
def test_what_is_clear_is_taken(form):
    net, images = Net(CLEAR[form]), torch.rand(5, 3, 6, 6)
    found = classifier(module=net).tried()
    with torch.no_grad():
        wanted = net.eval().body(found.prepare(images))
        logits = found.eval().logits(images).float()
    assert logits.shape == (5, 3)
    torch.testing.assert_close(logits.softmax(1), wanted.softmax(1), atol=1e-3, rtol=0)  # half has 3 digits


def test_a_plain_network_stays_as_it_is():
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    found = classifier(module=net)
    assert found.tried(training=True) is found and found.tried() is found
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_student_that_answers_otherwise_while_it_learns():
    """Inception's auxiliary head: a tensor in evaluation, a tuple with `logits` in training."""

    class Auxiliary(Net):
        def forward(self, x):
            return Heads(self.body(x), 2 * self.body(x)) if self.training else self.body(x)

    assert classifier(module=Auxiliary()).tried().module.__class__ is Auxiliary
    found = classifier(module=Auxiliary()).tried(training=True).module
    assert isinstance(found, Logits) and found.train()(torch.rand(2, 3, 6, 6)).shape == (2, 3)
    assert found.eval()(torch.rand(2, 3, 6, 6)).shape == (2, 3)


REFUSED = {
    "softmax": (lambda y: y.softmax(1), "ends with a softmax"),
    "two heads": (lambda y: (y, y), "2 of them could be logits of 3 classes"),
    "features alone": (lambda y: (torch.zeros(len(y), 9), torch.zeros(len(y), 3, 2, 2)), "none of them can be"),
    "maps": (lambda y: y[:, :, None, None].expand(-1, -1, 2, 2), r"answers 4 images with \[4, 3, 2, 2\]"),
    "summed": (lambda y: y.sum(1), r"answers 4 images with \[4\]"),
    "turned": (lambda y: y.T, r"answers 4 images with \[3, 4\]"),
    "squeezed": (lambda y: y.squeeze(0), "by the rest of its batch"),
    "classes": (lambda y: y.argmax(1), "answers with torch.int64"),
    "nan": (lambda y: y / 0 * 0, "not finite"),
    "overflow": (lambda y: (y * 1e5).half(), "not finite"),
    "object": (lambda y: SimpleNamespace(logits=y), "answers with a SimpleNamespace"),
    "logits of text": (lambda y: {"logits": "y"}, "logits that are a str"),
    "batch": (lambda y: F.batch_norm(y, None, None, training=True), "by the rest of its batch"),
    "dropout": (lambda y: F.dropout(y, 0.5), "differently each time"),
    "ten": (lambda y: y.repeat(1, 4)[:, :10], "gives 10 logits: there are 3 class names"),
    "fails": (lambda y: y @ torch.zeros(2, 2), "given 4 images of 6 x 6, fails: RuntimeError"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_clear_is_refused_by_name(form):
    answer, words = REFUSED[form]
    with pytest.raises(UsageError, match=words) as caught:
        classifier(answer).tried()
    assert "Net" in str(caught.value)


def test_layers_that_stay_in_training_mode():
    class Stubborn(Net):
        def train(self, mode=True):
            super().train(mode)
            self.body[0].train()
            return self

    with pytest.raises(UsageError, match="use evaluation mode in all of its layers"):
        classifier(module=Stubborn()).tried()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ("a", "b", "a")}, "two classes named 'a'"),
        ({"mean": (123.7, 116.3, 103.5)}, "divide those of 0..255 by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "divide those of 0..255 by 255"),
        ({"std": (0.2, 0.0, 0.2)}, "std 0.2, 0.0, 0.2"),
        ({"mean": (0.5,)}, "three channels"),
        ({"mean": (float("nan"),) * 3}, "mean nan"),
    ],
)
def test_what_no_classifier_can_be(changes, words):
    with pytest.raises(UsageError, match=words):
        classifier().replace(**changes)


def test_called_in_training_mode():
    """BatchNorm would answer by the batch, and learn from it."""
    found = classifier(module=Net().train())
    with pytest.raises(UsageError, match="Net is in training mode"):
        found(torch.rand(2, 3, 6, 6))
    assert found.eval()(torch.rand(2, 3, 6, 6)).shape == (2, 3)
