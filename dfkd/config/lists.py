"""Names from a file instead of a list: `@FILE`, or `@NAME` of the class lists that come with the package.

FILE.txt   one name a line; commas and spaces within a line belong to the name
FILE.json  a list of names; {name: index}; {index: name}
FILE.toml  one list of names, under any key

dfkd/data/class_lists: cifar10 and cifar100 (the order of the data sets), tiny-imagenet (of its sorted folders),
imagenet (1 000, torchvision's words), domainnet (345, the order of its lists).
"""

import json
import tomllib
from pathlib import Path
from typing import Any

LISTS = Path(__file__).parents[1] / "data" / "class_lists"


def names_in(source: str) -> tuple[str, ...]:
    """The names that `source`, a file's path or a list of the package, holds in their order.

    Raises ValueError: no such file, or one that holds no list of names.
    """
    known = {path.stem: path for path in sorted(LISTS.glob("*.txt"))}
    path = known.get(source, Path(source).expanduser())
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
        names = _listed(_parsed(text, path.suffix.lower()))
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}); lists that need no file: {', '.join(known)}"
        ) from None
    except (ValueError, TypeError) as error:  # also JSONDecodeError, TOMLDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} holds no list of names: {error}") from None
    if not names:
        raise ValueError(f"{path} holds no name")
    return names


def _parsed(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        lists = [value for value in tomllib.loads(text).values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"it has {len(lists)} lists, one is wanted")
        return lists[0]
    return [line.strip() for line in text.splitlines() if line.strip()]


def _listed(found: Any) -> tuple[str, ...]:
    """A list of text, or an object that numbers names from 0, as names in their order."""
    if isinstance(found, dict):
        pairs = list(found.items())
        if pairs and all(isinstance(value, str) for _, value in pairs):  # {"0": "cat"}
            pairs = [(value, int(key)) for key, value in pairs]
        numbers = [number for _, number in pairs]
        if sorted(numbers) != list(range(len(pairs))):
            raise ValueError(f"names are numbered 0 to {len(pairs) - 1}, each once")
        found = [name for name, _ in sorted(pairs, key=lambda pair: pair[1])]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError("wanted is a list of text")
    return tuple(name.strip() for name in found)
