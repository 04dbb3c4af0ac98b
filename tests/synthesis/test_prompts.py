"""Labels, classes and prompts as functions of the id."""

import pytest
import torch

from dfkd.errors import UsageError
from dfkd.synthesis.prompts import chosen_classes, labels_of, prompt_of, unknown_labels

NAMES = ("zero", "one", "alarm_clock")


def test_all_classes_unless_some_are_named():
    assert chosen_classes(NAMES, ()) == (0, 1, 2)
    assert chosen_classes(NAMES, ("alarm_clock", "zero")) == (2, 0)


@pytest.mark.parametrize("name, hint", [("zeros", "include zero"), ("cat", "include zero, one, alarm_clock")])
def test_unknown_class(name, hint):
    with pytest.raises(UsageError, match=f"unknown class '{name}': the teacher's 3 classes {hint}"):
        chosen_classes(NAMES, ("one", name))


def test_a_class_named_twice_is_refused():
    with pytest.raises(UsageError, match="class 'one' is named twice"):
        chosen_classes(NAMES, ("one", "zero", "one"))


def test_any_run_of_ids_is_balanced():
    labels = labels_of(torch.arange(100, 112), (2, 0, 1))
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [4, 4, 4]
    assert torch.equal(labels, labels_of(torch.arange(200), (2, 0, 1))[100:112])


@pytest.mark.parametrize("classes, group", [(100, 64), (33, 64), (5, 7), (2, 3), (3, 2)])
def test_a_group_too_small_for_all_classes_holds_pairs(classes, group):
    labels = labels_of(torch.arange(2 * classes * group), range(classes), partners_in=group)
    for own in labels.split(group):
        assert own.bincount()[own].min() >= 2  # every image has a partner
    assert labels.bincount(minlength=classes).min() > 0


def test_a_group_with_two_of_every_class_is_left_as_it_is():
    assert torch.equal(labels_of(torch.arange(60), range(3), partners_in=6), labels_of(torch.arange(60), range(3)))


def test_pairs_are_balanced():
    assert labels_of(torch.arange(200), range(100), partners_in=64).bincount().tolist() == [2] * 100


def test_words_that_the_prior_does_not_know():
    assert unknown_labels("a {label}", ["ice cream", "dog"], ()) == ""
    assert unknown_labels("a {label}", ["ice_cream", "dog"], ("dog", "ice cream")) == ""
    assert unknown_labels("a photo", ["cat"], ("dog",)) == ""
    assert unknown_labels("a {label}", ["cat", "dog", "ice_cream"], ("dog", "emu")).startswith(
        "the prior does not know cat, ice_cream, and will draw something else: the words that it knows are dog, emu"
    )


def test_prompts():
    assert prompt_of("a photo of the digit {label}", "seven") == "a photo of the digit seven"
    assert prompt_of("an {label}.", "alarm_clock") == "an alarm clock."
    assert prompt_of("a realistic photo", "seven") == "a realistic photo"


@pytest.mark.parametrize("template", ["a {class}", "a {}", "a {label", "a {0}", "a {label.size}", "a {label[x]}"])
def test_other_placeholders_are_refused(template):
    with pytest.raises(UsageError, match=r"cannot be filled in.*use \{label\} as the only placeholder"):
        prompt_of(template, "seven")
