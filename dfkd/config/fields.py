"""Settings as nested frozen dataclasses whose every field is declared once, with its help, range and choices.

    @dataclass(frozen=True, kw_only=True)
    class StepConfig(Config):
        '''Title of the group in --help.'''
        length: float = option(0.2, "length of a step", low=0, flag="step_length")

    @dataclass(frozen=True, kw_only=True)
    class RunConfig(Config):
        count: int = option(1000, "how many images", unit="images", low=1)
        step: StepConfig = nested(StepConfig)

    RunConfig.of(count=8, step_length=0.1).step.length == 0.1

Flags, presets, TOML files, settings.json and keyword arguments all speak of the *flat* names: the field's own name, or
its `flag` where the name alone would not say enough. A flat name is unique within a class and all that it nests.
"""

import dataclasses
import math
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from dfkd.config.lists import names_in
from dfkd.config.words import nearest
from dfkd.errors import SettingError

PRESETS = Path(__file__).parents[1] / "presets"


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    flag: str = "",
    extensible: bool = False,
    identity: bool = True,
    none: Any = None,
) -> Any:
    """A field with what `--help` and the checks need. A default of MISSING makes it required.

    low and high are inclusive; unit is shown beside them ("images", "pixels"); flag is the flat name where it is not
    the field's own. extensible: beside the choices, `FILE.py:NAME` names an object in a file of the user's own.
    identity: False for what decides where and how a result is computed, and not what comes out.
    none: what the word `none` stands for, where that is not None.
    """
    facts = {"help": help, "choices": choices, "unit": unit, "low": low, "high": high, "flag": flag}
    facts |= {"extensible": extensible, "identity": identity, "none": none}
    return field(default=default, metadata=facts)


def nested(kind: "type[Config]", **defaults: Any) -> Any:
    """A field that holds another group of settings; `defaults`, by flat name, replace the group's own here."""
    return field(default_factory=lambda: kind.of(**defaults), metadata={"group": kind, "defaults": defaults})


@dataclass(frozen=True)
class Leaf:
    """One setting of a class or of what it nests.

    name: its flat name. path: the attributes that lead to it. owner: the class that declares it. facts: of `option`.
    """

    name: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    owner: "type[Config]"
    facts: Mapping[str, Any]

    def convert(self, value: object) -> Any:
        """`value` (text of a flag, a value of TOML or of Python) as the field's type, within its range and choices.

        Raises ValueError, which says what is wanted.
        """
        if self.facts["none"] is not None and isinstance(value, str) and value.lower() == "none":
            value = self.facts["none"]
        found = convert(value, self.kind)
        check(found, self.facts)
        return found


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every group of settings: checked when it is made, read and replaced by flat names.

    Raises SettingError, a ValueError, for a value that it refuses.
    """

    SECTION: ClassVar[str] = ""  # of a preset or run file
    EXAMPLE: ClassVar[str] = ""  # a line of flags for --help
    POSITIONAL: ClassVar[str] = ""  # flat name that a command also takes without its flag
    EXCLUSIVE: ClassVar[tuple[tuple[str, ...], ...]] = ()  # flat names of which the last one given counts

    def __post_init__(self) -> None:
        for leaf in leaves(type(self)).values():
            if len(leaf.path) == 1:
                value = getattr(self, leaf.path[0])
                try:
                    object.__setattr__(self, leaf.path[0], leaf.convert(value))
                except ValueError as error:
                    raise SettingError(f"{leaf.name} is {value!r}: {error}") from None
        try:
            self.validate()
        except ValueError as error:
            raise SettingError(str(error)) from None

    def validate(self) -> None:
        """Raise ValueError for settings that do not fit together."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """An instance from flat names. Raises ValueError: unknown, wrong, or a required one absent."""
        known = leaves(cls)
        if unknown := sorted(values.keys() - known.keys()):
            near = nearest(unknown[0], known).replace("-", "_")
            raise SettingError(f"{cls.__name__} has no setting {unknown[0]!r}" + (f": {near}" if near else ""))
        defaults = {name: leaf.default for name, leaf in known.items()}
        return _build(cls, (), merged(cls, defaults, values))  # type: ignore[no-any-return]

    @classmethod
    def preset(cls, name: str, **values: Any) -> Self:
        """The settings of a preset (`dfkd/presets/NAME.toml`), with some replaced by flat name.

        Raises ValueError: no such preset, or as `of`.
        """
        own = {key: value for key, value in section(read_preset(name), cls.SECTION).items() if key in leaves(cls)}
        return cls.of(**merged(cls, own, values))

    def replace(self, **values: Any) -> Self:
        """A copy with some settings replaced by flat name. Raises ValueError as `of`."""
        return type(self).of(**merged(type(self), self.flat(), values))

    def flat(self) -> dict[str, Any]:
        """Every setting by flat name."""
        return {name: _read(self, leaf.path) for name, leaf in leaves(type(self)).items()}

    def identity(self) -> dict[str, Any]:
        """The settings that decide a result, by flat name, in JSON's types."""
        kept = {name: value for name, value in self.flat().items() if leaves(type(self))[name].facts["identity"]}
        return plain(kept)  # type: ignore[no-any-return]

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by flat name."""
        return {name: value for name, value in self.flat().items() if value != leaves(type(self))[name].default}


def merged(cls: type[Config], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of flat names, each overriding the one before; of exclusive names only the last one given stays."""
    found: dict[str, Any] = {}
    for layer in layers:
        for group in exclusive(cls):
            if any(layer.get(name) is not None for name in group):
                found |= dict.fromkeys(group)
        found |= layer
    return found


def exclusive(cls: type[Config]) -> tuple[tuple[str, ...], ...]:
    """The groups of exclusive names of a class and of what it nests."""
    owners = {leaf.owner: None for leaf in leaves(cls).values()}
    return tuple(group for owner in owners for group in owner.EXCLUSIVE)


def plain(value: Any) -> Any:
    """`value` in JSON's types: paths as text, tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def leaves(cls: type[Config]) -> Mapping[str, Leaf]:
    """Every setting of a class by flat name, in the order of declaration."""
    if cls in _LEAVES:
        return _LEAVES[cls]
    found = _LEAVES[cls] = {}
    for leaf in _leaves(cls, (), {}):
        if leaf.name in found:
            raise TypeError(f"{cls.__name__}: the flat name {leaf.name!r} is used twice")
        found[leaf.name] = leaf
    return found


_LEAVES: dict[type[Config], dict[str, Leaf]] = {}


def _leaves(cls: type[Config], before: tuple[str, ...], defaults: Mapping[str, Any]) -> Iterator[Leaf]:
    kinds = get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        path = (*before, spec.name)
        if (group := spec.metadata.get("group")) is not None:
            yield from _leaves(group, path, {**spec.metadata["defaults"], **defaults})
        else:
            name = spec.metadata["flag"] or spec.name
            yield Leaf(name, path, kinds[spec.name], defaults.get(name, spec.default), cls, spec.metadata)


def _build(cls: type[Any], before: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    arguments = {}
    for spec in dataclasses.fields(cls):
        if (group := spec.metadata.get("group")) is not None:
            arguments[spec.name] = _build(group, (*before, spec.name), values)
            continue
        name = spec.metadata["flag"] or spec.name
        if values[name] is MISSING:
            raise SettingError(f"{name} is missing: {spec.metadata['help']}")
        arguments[spec.name] = values[name]
    return cls(**arguments)


def _read(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def presets() -> dict[str, Mapping[str, Any]]:
    """Every preset by name: its TOML file as it is read."""
    return {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(PRESETS.glob("*.toml"))}


def read_preset(name: str) -> Mapping[str, Any]:
    """The TOML of one preset. Raises ValueError where there is none of that name."""
    if name not in (known := presets()):
        raise SettingError(f"there is no preset {name!r}: known are {', '.join(known)}")
    return known[name]


def section(file: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section of a preset or run file, its keys as flat names."""
    return {key.replace("-", "_"): value for key, value in dict(file.get(name, {})).items()}


def split_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if get_origin(kind) in (types.UnionType, Union):
        (inner,) = (member for member in get_args(kind) if member is not type(None))
        return inner, True
    return kind, False


def convert(value: object, kind: Any) -> Any:
    """`value` as `kind`: int, float, str, bool, Path, a tuple of str, int or float, or one of these or None.

    Text "none" is None where None is allowed: TOML and the command line have no other way to take back what a preset
    has set. Raises ValueError, which says what is wanted.
    """
    inner, optional = split_optional(kind)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    return _CONVERTERS[inner](value)


def check(value: Any, facts: Mapping[str, Any]) -> None:
    """Raise ValueError unless `value` lies in the range and among the choices of an option."""
    if value is None:
        return
    choices, low, high = facts["choices"], facts["low"], facts["high"]
    for item in value if isinstance(value, tuple) else (value,):
        if choices is not None and _named(item, facts) not in choices and not (facts["extensible"] and ".py:" in item):
            own = ", or FILE.py:NAME" if facts["extensible"] else ""
            raise ValueError("it must be one of " + ", ".join(map(str, choices)) + own)
        if low is not None and item < low:
            raise ValueError(f"it must be at least {low}")
        if high is not None and item > high:
            raise ValueError(f"it must be at most {high}")


def _named(item: Any, facts: Mapping[str, Any]) -> Any:
    """A choice without the settings in its parentheses, where it may have some."""
    return item.partition("(")[0] if facts["extensible"] and isinstance(item, str) else item


def _int(value: object) -> int:
    wanted = ValueError("it must be a whole number")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wanted
    try:
        return int(value)
    except ValueError:
        raise wanted from None


def _float(value: object) -> float:
    wanted = ValueError("it must be a number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wanted
    try:
        number = float(value)
    except ValueError:
        raise wanted from None
    if not math.isfinite(number):
        raise ValueError("it must be a finite number")
    return number


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it must be text")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("it must be a path")
    return Path(value).expanduser()


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("@"):
        return names_in(value[1:])
    parts = re.split(r",(?![^(]*\))", value) if isinstance(value, str) else value  # commas in parentheses stay
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("it must be names, separated by commas, in a list, or @FILE")
    return tuple(part.strip() for part in parts if part.strip())


def _integers(value: object) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("it must be whole numbers, separated by commas or in a list")
    return tuple(_int(part) for part in parts)


def _numbers(value: object) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("it must be numbers, separated by commas or in a list")
    return tuple(_float(part) for part in parts)


_CONVERTERS: dict[Any, Callable[[object], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    Path: _path,
    tuple[str, ...]: _names,
    tuple[int, ...]: _integers,
    tuple[float, ...]: _numbers,
}
