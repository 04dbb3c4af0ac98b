"""Prompts and labels of images, as functions of the image id."""

import difflib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dfkd.errors import UsageError


def chosen_classes(class_names: Sequence[str], only: Sequence[str]) -> tuple[int, ...]:
    """Label indices of the classes to synthesise, all of them when `only` is empty.

    Raises UsageError for a name that the teacher does not know, and for one that comes twice.
    """
    for name in only:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, 3) or list(class_names)[:10]
            raise UsageError(
                f"unknown class {name!r}", f"the teacher's {len(class_names)} classes include {', '.join(near)}"
            )
        if list(only).count(name) > 1:
            raise UsageError(f"class {name!r} is named twice", "every class gets an equal share", "name each one once")
    return tuple(class_names.index(name) for name in only) or tuple(range(len(class_names)))


def labels_of(ids: Tensor, classes: Sequence[int], partners_in: int = 0) -> Tensor:
    """Labels int64 [n] of image ids [n]: the classes in turn, so that any run of ids is balanced.

    partners_in: size of the groups, at least 2, in which every image needs another one of its class; 0 where none does.
    A group too small for two images of every class holds pairs: the classes come in turn by two.
    """
    turn = ids
    if 0 < partners_in < 2 * len(classes):
        pairs = partners_in // 2  # the last image of an odd group is its last pair's third
        turn = ids // partners_in * pairs + (ids % partners_in // 2).clamp(max=pairs - 1)
    return torch.tensor(classes, dtype=torch.int64)[turn % len(classes)]


def prompt_of(template: str, class_name: str) -> str:
    """The prompt of a class; a template without {label} is class-free and stays as it is.

    Underscores in a class name are read as spaces. Raises UsageError for any other placeholder.
    """
    try:
        return template.format(label=words_of(class_name))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"prompt {template!r} cannot be filled in", f"{error!r}", "use {label} as the only placeholder"
        ) from None


def words_of(class_name: str) -> str:
    """A class as a prompt names it."""
    return class_name.replace("_", " ")


def unknown_labels(template: str, names: Sequence[str], known: Sequence[str]) -> str:
    """A warning for classes that the prior has never seen the words of, "" where there are none.

    names: the classes to draw. known: all words that the prior was trained on; () for a prior that takes any text.
    Underscores are spaces, and case does not count, as to CLIP's tokenizer.
    """
    read = {words_of(word).casefold() for word in known}
    strange = [name for name in names if words_of(name).casefold() not in read]
    if not (known and strange and "{label}" in template):
        return ""
    return (
        f"the prior does not know {_some(strange)}, and will draw something else: the words that it knows are "
        f"{_some(known)}; give a --prior that knows the teacher's classes"
    )


def unused_tokens(tokens: Sequence[str], prompts: Sequence[str]) -> str:
    """A warning for added words (textual inversion) that are in no prompt, "" where there are none."""
    unused = [token for token in tokens if not any(token in prompt for prompt in prompts)]
    return f"no prompt has {_some(unused)}, which textual inversion added: write it into --prompt" if unused else ""


class Reader(Protocol):
    """What is asked of a text encoder and its tokenizer, dfkd_engine.priors.families.text.TextEncoder."""

    def tokens(self, prompt: str) -> list[int]: ...
    def lost(self, prompt: str) -> str: ...
    def strange(self, prompt: str) -> bool: ...


def unread_words(prompts: Sequence[str], readers: Sequence[Reader]) -> str:
    """A warning for what the tokenizers leave out of the classes' prompts, "" where that is nothing.

    Raises UsageError: two prompts that differ become the same tokens, so that their classes would get the same images.
    """
    if not readers:
        return ""
    read: dict[tuple[tuple[int, ...], ...], str] = {}
    warned: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        lost = next((text for reader in readers if (text := reader.lost(prompt))), "")
        strange = any(reader.strange(prompt) for reader in readers)
        tokens = tuple(tuple(reader.tokens(prompt)) for reader in readers)
        other = read.setdefault(tokens, prompt)
        if other != prompt and (lost or strange):
            why = f"its tokenizer cuts off {lost!r} of the second" if lost else "its tokenizer has no tokens for them"
            what = f"the prompts {other!r} and {prompt!r} are one to the prior"
            todo = "shorten --prompt" if lost else "use words that the prior knows, in --prompt or as class names"
            raise UsageError(what, f"{why}, and images of these classes would not differ", todo)
        if other != prompt:
            warned[prompt] = f"{other!r} and {prompt!r} are one to the prior's tokenizer"
        elif lost:
            warned[prompt] = f"the prior does not read {lost!r}, the end of {prompt!r}: it is too long"
        elif strange:
            warned[prompt] = f"the prior's tokenizer does not know all of {prompt!r}"
    if not warned:
        return ""
    return next(iter(warned.values())) + (f"; so it is with {len(warned)} classes" if len(warned) > 1 else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
