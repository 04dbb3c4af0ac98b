"""Classes by name, for denoisers that take a number: "tiger shark" is 3 where the prior says that it is."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.folder import FACTS, PriorFolder


class ClassNames:
    """The ids of a prior's classes by their names.

    An entry may hold synonyms, separated by ", " as ImageNet's do; each of them names the class, and so does the whole
    entry. A name that is written exactly so goes first ("Cardigan" is a dog, "cardigan" a garment); otherwise case does
    not count, and underscores are spaces. A name that several classes share has the id behind it ("crane 134").

    names: the entry of each class, by id. source: of the prior, for errors.
    """

    def __init__(self, names: Mapping[int, str], source: str) -> None:
        self.names, self.source = dict(names), source
        wholes = {i: [name.strip()] for i, name in names.items()}
        parts = {i: [part.strip() for part in name.split(",")] for i, name in names.items()}
        self._tables = [(read, _ids(entries, read)) for read in (str.strip, _folded) for entries in (wholes, parts)]

    @classmethod
    def of(cls, folder: PriorFolder, count: int) -> "ClassNames":
        """The names of `count` classes: `labels` in dfkd.json, in order of their ids, or id2label in model_index.json.

        Raises EngineError: neither is there, or there is not one for every class. More names than classes are those of
        another model, or begin with one for no class, and then each names its neighbour.
        """
        labels: Sequence[str] = folder.facts()[1]
        names: dict[int, str] = dict(enumerate(labels))
        if not names:
            try:
                names = {int(i): str(name) for i, name in folder.configs["model_index"].get("id2label", {}).items()}
            except (ValueError, AttributeError) as error:
                what = f"{folder.path / 'model_index.json'}: id2label"
                raise EngineError(what, f"it is no table of class ids and names ({error})", "correct it") from None
        missing = sorted(set(range(count)) - names.keys())
        if missing:
            why = f"it takes {count} class ids, and {len(missing)} of them have no name, first {missing[0]}"
            todo = f'list all names in order in its {FACTS}: {{"labels": ["...", ...]}}'
            if missing == [count - 1] and folder.configs["dfkd"].get("null_class") is None:
                todo += f'; where the last one stands for no class, add "null_class": {count - 1}'
            raise EngineError(f"prior {folder.path}", why, todo)
        if more := sorted(names.keys() - set(range(count))):
            why = f"it takes {count} class ids, and {len(names)} are named, {more[0]} ({names[more[0]]}) among them"
            todo = f"name the ids 0 to {count - 1} alone, in order, as labels in its {FACTS}"
            raise EngineError(f"prior {folder.path}", why, todo)
        return cls(names, str(folder.path))

    def ids(self, names: Sequence[str]) -> list[int]:
        """`id_of` each name."""
        return [self.id_of(name) for name in names]

    def id_of(self, name: str) -> int:
        """The id of the class called `name`. Raises EngineError for a name that no class has, or several."""
        for read, table in self._tables:
            found = table.get(read(name), [])
            if len(found) == 1:
                return found[0]
            if found:
                shown = ", ".join(f"{i} ({self.names[i]})" for i in found)
                todo = f"write the id behind it, such as {name} {found[0]}"
                raise EngineError(f"prior {self.source}: class {name!r}", f"it names the ids {shown}", todo)
        folded = self._tables[-1][1]
        word, _, number = name.strip().rpartition(" ")
        if number.isdecimal() and int(number) in folded.get(_folded(word), []):
            return int(number)
        near = difflib.get_close_matches(_folded(name), folded, 3) or list(self.names.values())[:10]
        why = f"it knows {len(self.names)} classes, such as {'; '.join(near)}; the prompt is the class's name"
        todo = (
            f"use a teacher whose classes it has, name them in {FACTS} as the teacher does, or draw others with --only"
        )
        raise EngineError(f"prior {self.source} has no class {name!r}", why, todo)

    def facts(self) -> dict[str, Any]:
        """The names in JSON's types: images follow from them."""
        return {"classes": [self.names[i] for i in sorted(self.names)]}


def _ids(entries: Mapping[int, Sequence[str]], read: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, words in entries.items():
        for word in dict.fromkeys(read(word) for word in words):
            found.setdefault(word, []).append(i)
    return found


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
