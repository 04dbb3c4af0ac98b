"""From a recipe, which is known without tracing anything, to the engine that it led to.

A recipe is a flat mapping of strings with at least "network". The links are a cache: a link that is missing, unreadable
or points to no engine is a miss, and the next build writes it anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dfkd_engine.errors import EngineError
from dfkd_engine.files import remove, remove_partials, replace_text
from dfkd_engine.spec import EngineSpec, canonical_json, differing

Recipe = dict[str, str]


def recipe_key(recipe: Mapping[str, str]) -> str:
    """The first 24 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(dict(recipe)).encode()).hexdigest()[:24]


def check_recipe(recipe: Mapping[str, str]) -> None:
    """Raise EngineError unless the recipe is a flat mapping of strings that names its network."""
    wrong = [name for name, value in recipe.items() if not isinstance(name, str) or not isinstance(value, str)]
    if wrong or "network" not in recipe:
        why = f"{wrong[0]!r} is no string" if wrong else "it names no network"
        raise EngineError("the engine recipe cannot be used", why, "give a flat mapping of strings with 'network'")


def contradictions(recipe: Mapping[str, str], spec: EngineSpec) -> list[tuple[str, str, str]]:
    """Fields that both have and that differ, as (field, in the recipe, in the spec)."""
    known = {name: getattr(spec, name) for name in ("network", "dtype", "backend", "device")}
    known |= {f"versions.{name}": value for name, value in spec.versions}
    known |= {f"flags.{name}": value for name, value in spec.flags}
    shared = recipe.keys() & known.keys()
    return differing({name: recipe[name] for name in sorted(shared)}, {name: known[name] for name in sorted(shared)})


def link(folder: Path, recipe: Mapping[str, str], key: str) -> None:
    """Let the recipe lead to the engine ``key``; raises OSError of the disk."""
    plain = {"recipe": dict(recipe), "engine": key}
    if read_link(folder / f"{recipe_key(recipe)}.json") != (dict(recipe), key):
        replace_text(folder / f"{recipe_key(recipe)}.json", json.dumps(plain, indent=1, sort_keys=True) + "\n")


def follow(folder: Path, recipe: Mapping[str, str]) -> str | None:
    """The key that exactly this recipe leads to, or None."""
    found = read_link(folder / f"{recipe_key(recipe)}.json")
    return found[1] if found is not None and found[0] == dict(recipe) else None


def links(folder: Path) -> Iterator[tuple[Path, Recipe, str]]:
    """(file, recipe, key) of every link that can be read, by name."""
    for path in sorted(folder.glob("*.json")):
        found = read_link(path)
        if found is not None:
            yield path, *found


def drop_dead(folder: Path, has: Callable[[str], bool]) -> int:
    """Delete links that lead to no engine or cannot be read, and what a killed writer left; returns the bytes freed.

    Only for the holder of the folder's lock.
    """
    remove_partials(folder)
    dead = [path for path in folder.glob("*.json") if (found := read_link(path)) is None or not has(found[1])]
    return sum(remove(path) for path in dead)


def read_link(path: Path) -> tuple[Recipe, str] | None:
    """(recipe, key), or None for a file that is absent or no link; raises OSError where it cannot be read."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        recipe, key = plain["recipe"], plain["engine"]
        check_recipe(recipe)
    except (FileNotFoundError, NotADirectoryError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return (recipe, key) if isinstance(key, str) else None
