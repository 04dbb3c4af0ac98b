"""What an engine is made of, as values: their digest is the name it is stored under.

The digest is known before anything is traced or compiled, and nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dfkd_engine.errors import EngineError

DTYPES = ("float32", "float16", "bfloat16", "int64")
ABSENT = "(absent)"
Difference = tuple[str, str, str]  # field, there, here

_ROWS = ("smallest", "planned", "largest")


@dataclass(frozen=True)
class TensorSpec:
    """One argument or result of an engine.

    name: an identifier; it is the ONNX name too. shape: sizes, None for the batch, which only stands in front.
    dtype: one of DTYPES. Raises EngineError.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise EngineError(f"the tensor name {self.name!r} cannot be used", "it is no identifier", "rename it")
        sizes = self.shape[1:] if self.batched else self.shape
        if not isinstance(self.shape, tuple) or not all(type(size) is int and size > 0 for size in sizes):
            why = "it is a tuple of sizes >= 1, with None for the batch in front only"
            raise EngineError(f"the shape {self.shape!r} of {self.name!r} cannot be used", why, "correct it")
        if self.dtype not in DTYPES:
            todo = f"use one of {', '.join(DTYPES)}"
            raise EngineError(f"the dtype {self.dtype!r} of {self.name!r} cannot be used", "it is unknown", todo)

    @property
    def batched(self) -> bool:
        """True if the batch stands in front."""
        return self.shape[:1] == (None,)

    def sizes(self, rows: int) -> list[int]:
        """The shape of a tensor of so many rows."""
        return [rows if size is None else size for size in self.shape]

    def shape_text(self) -> str:
        return f"[{', '.join('B' if size is None else str(size) for size in self.shape)}]"

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {self.shape_text()}"


@dataclass(frozen=True)
class EngineSpec:
    """All that changes what one engine computes or how it is compiled, and nothing else.

    network: what the function is called. config: its settings, plain JSON. components: digest of each network or file
    that it is made of, by name. inputs, outputs: in the order of the call. rows: of a call: smallest, planned, largest.
    dtype: of the networks. backend: its name. versions: of the packages that change compiled bytes; flags: options that
    do. device: in the words of `devices.architecture`. sources: digest of the code that makes the function and
    compiles it. Raises EngineError on values that no engine can have.
    """

    network: str
    config: Mapping[str, Any]
    components: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rows: tuple[int, int, int]
    dtype: str
    backend: str
    versions: Mapping[str, str]
    device: str
    flags: Mapping[str, str]
    sources: str

    def __post_init__(self) -> None:
        for field in ("network", "dtype", "backend", "device", "sources"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise _bad(field, getattr(self, field), "it is a string that is not empty")
        for field in ("inputs", "outputs"):
            tensors = getattr(self, field)
            if not isinstance(tensors, tuple) or not tensors or not all(isinstance(t, TensorSpec) for t in tensors):
                raise _bad(field, tensors, "it is a tuple of one TensorSpec or more")
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise _bad(field, [tensor.name for tensor in tensors], "every name is used once")
        if self.dtype not in DTYPES:
            raise _bad("dtype", self.dtype, f"known are {', '.join(DTYPES)}")
        rows = self.rows
        if not isinstance(rows, tuple) or len(rows) != 3 or not all(type(size) is int for size in rows):
            raise _bad("rows", rows, f"it is a tuple of three sizes: {', '.join(_ROWS)}")
        if not 1 <= rows[0] <= rows[1] <= rows[2]:
            raise _bad("rows", rows, "1 <= smallest <= planned <= largest")
        for field in ("components", "versions", "flags"):
            value = getattr(self, field)
            if not isinstance(value, Mapping) or not all(isinstance(s, str) for pair in value.items() for s in pair):
                raise _bad(field, value, "it is a mapping of strings to strings")
            object.__setattr__(self, field, dict(sorted(value.items())))
        try:  # in JSON's types, so that a spec that was stored equals the one it came from
            object.__setattr__(self, "config", json.loads(canonical_json(dict(self.config))))
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad("config", self.config, f"it is plain JSON ({error})") from None

    def key(self) -> str:
        """The engine's name in the store: 24 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: what `from_json` reads back as an equal spec."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """The spec that `to_json` wrote as plain JSON values.

        Raises EngineError where fields are missing, unknown or of the wrong kind.
        """
        names = sorted(field.name for field in fields(cls))
        if not isinstance(plain, Mapping) or sorted(plain) != names:
            found = ", ".join(sorted(plain)) if isinstance(plain, Mapping) else repr(plain)
            raise _unreadable(f"its fields are {found or 'none'}; wanted are {', '.join(names)}")
        try:
            values = dict(plain)
            for field in ("inputs", "outputs"):
                values[field] = tuple(TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in plain[field])
            values["rows"] = tuple(plain["rows"])
            return cls(**values)
        except EngineError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(f"{type(error).__name__}: {error}") from None


def rows_of(tensors: Sequence[Sized], inputs: Sequence[TensorSpec]) -> int:
    """The batch of a call's arguments; 0 where none has one."""
    return next((len(tensor) for tensor, wanted in zip(tensors, inputs, strict=True) if wanted.batched), 0)


def canonical_json(plain: object) -> str:
    """One text per value, on every machine: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def differences(there: EngineSpec, here: EngineSpec) -> list[Difference]:
    """Every differing field as (field, value there, value here); [] for equal specs.

    A field inside a field is written "versions.torch", "config.losses.bn.weight", "rows.planned" or "inputs.1", which
    is the first input with its shape. What one of them lacks is "(absent)".
    """
    return differing(_flat(there), _flat(here))


def differing(there: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    """(name, value there, value here) where two flat mappings differ, "(absent)" for what is missing."""
    names = [*there, *(name for name in here if name not in there)]
    return [(n, there.get(n, ABSENT), here.get(n, ABSENT)) for n in names if there.get(n) != here.get(n)]


def _flat(spec: EngineSpec) -> dict[str, str]:
    nested = {field.name: getattr(spec, field.name) for field in fields(spec)}
    for field in ("inputs", "outputs"):
        nested[field] = {str(place): str(tensor) for place, tensor in enumerate(nested[field], 1)}
    nested["rows"] = dict(zip(_ROWS, spec.rows, strict=True))
    return dict(_leaves(nested, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or "." not in path):  # an empty one inside config is a value
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name)
    else:
        yield path, value if isinstance(value, str) else canonical_json(value)


def _bad(field: str, value: object, why: str) -> EngineError:
    return EngineError(f"the engine spec's {field} cannot be {value!r}", why, "correct it")


def _unreadable(why: str) -> EngineError:
    return EngineError("the engine spec cannot be read", why, "rebuild the engine with dfkd-engines build")
