"""Labels, classes and prompts as functions of the id."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from dfkd.errors import UsageError
from dfkd.synthesis.prompts import chosen_classes, labels_of, prompt_of, unknown_labels, unread_words
from dfkd_engine.priors.families.stable_diffusion import last_hidden_state
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.prior import Prior
from tests.tiny_sd import write_tokenizer

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
    assert unknown_labels("a {label}", ["ice_cream", "Dog"], ("dog", "Ice_cream")) == ""
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


@pytest.fixture(scope="module")
def demo():
    return Prior.from_pretrained("demo").family.readers


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A reader of 77 tokens, whose tokenizer knows small letters and digits alone."""
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_attention_heads=1)
    return (TextEncoder(CLIPTextModel(config), tokenizer, last_hidden_state),)


def prompts(template, *names):
    return [prompt_of(template, name) for name in names]


def test_prompts_whose_labels_are_cut_off_are_refused(demo, letters):
    template = "a high quality photo of the digit {label}"
    with pytest.raises(UsageError, match=r"digit zero' and .*digit one' are one to the prior: .*cuts off '.*one' of"):
        unread_words(prompts(template, "zero", "one"), demo)
    assert unread_words(prompts("the digit {label}", "zero", "one"), demo) == ""
    long = "x" * 76 + "{label}"
    with pytest.raises(UsageError, match="cuts off"):
        unread_words(prompts(long, "a", "b"), letters)
    longer = TextEncoder(letters[0].network, letters[0].tokenizer, last_hidden_state, length=100)
    assert "does not read" in unread_words(prompts(long, "a", "b"), (*letters, longer))  # which tells them apart


def test_words_without_tokens(letters):
    with pytest.raises(UsageError, match="'a да' and 'a ня' are one to the prior: its tokenizer has no tokens"):
        unread_words(prompts("a {label}", "да", "ня"), letters)
    assert "does not know all of 'a дa'" in unread_words(["a дa", "a b"], letters)
    assert unread_words(["", "a b"], letters) == ""


def test_what_is_not_read_is_said(letters):
    said = unread_words(prompts("{label} " + "a " * 80 + "the end", "b", "c", "d"), letters)
    assert "the end', the end of 'b a a" in said and "so it is with 3 classes" in said
    assert unread_words(["a Cat", "a cat"], letters) == "'a Cat' and 'a cat' are one to the prior's tokenizer"
    assert unread_words(["a Cat", "a cat"], ()) == ""
