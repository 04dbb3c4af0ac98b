"""Prompts and labels of images, as functions of the image id."""

import difflib
from collections.abc import Sequence

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


def labels_of(ids: Tensor, classes: Sequence[int]) -> Tensor:
    """Labels int64 [n] of image ids [n]: the classes in turn, so that any run of ids is balanced."""
    return torch.tensor(classes, dtype=torch.int64)[ids % len(classes)]


def prompt_of(template: str, class_name: str) -> str:
    """The prompt of a class; a template without {label} is class-free and stays as it is.

    Underscores in a class name are read as spaces. Raises UsageError for any other placeholder.
    """
    try:
        return template.format(label=class_name.replace("_", " "))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"prompt {template!r} cannot be filled in", f"{error!r}", "use {label} as the only placeholder"
        ) from None
