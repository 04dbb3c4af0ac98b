"""Weight files: every form in which people have one network gives that network, and what is none says what it is."""

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.teachers import Classifier
from dfkd.teachers.weights import read_weights
from tests.teachers.weight_files import NAMES, REFUSED, SAVED, WRITTEN, weights, write_described


@pytest.mark.parametrize("form", [*SAVED, *WRITTEN])
def test_every_form_is_the_same_network(form, tmp_path):
    file = tmp_path / (form if form in WRITTEN else "weights.pth")
    WRITTEN[form](file) if form in WRITTEN else torch.save(SAVED[form](), file)
    found = Classifier.from_pretrained(file, architecture=write_described(tmp_path), class_names=NAMES)
    state = found.state_dict()
    for name, value in weights().items():
        if "num_batches" not in name:
            assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_file_says_what_it_is(name, tmp_path):
    file = tmp_path / name
    write, words = REFUSED[name]
    write(file)
    with pytest.raises(UsageError, match=words) as caught:
        Classifier.from_pretrained(file, architecture=write_described(tmp_path), class_names=NAMES)
    text = str(caught.value)
    assert name in text and "weights_only" not in text and "safe_globals" not in text and "\n" not in text


def test_nothing_in_a_file_is_executed(tmp_path):
    """A pickle that calls a function gets a stand-in for it; torch refuses those of os outright."""

    class Call:
        def __init__(self, function, *arguments):
            self.asked = function, arguments

        def __reduce__(self):
            return self.asked

    import os

    marker = tmp_path / "made"
    torch.save({"state_dict": weights(), "x": Call(open, str(marker), "w")}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == weights().keys()
    torch.save({"state_dict": weights(), "x": Call(os.mkdir, str(marker))}, tmp_path / "b.pth")
    with pytest.raises(UsageError, match="other objects than tensors"):
        read_weights(tmp_path / "b.pth")
    assert not marker.exists()
