"""What changes an engine's bytes, as values: their digest is the name an engine is stored under.

Nothing here imports torch: a command that only asks which engines are current must answer at once.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from dfkd_engine.errors import EngineError

DTYPES = ("float32", "float16", "bfloat16", "int64")
ABSENT = "(absent)"

_BATCH = ("smallest", "planned", "largest")

# The levels of the x86-64 psABI that compilers vectorise for, widest first, by the names of /proc/cpuinfo ("abm" is
# lzcnt). Inductor compiles with -march=native, so code of a higher level dies of an illegal instruction below it.
_X86_LEVELS = (
    ("avx512", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("avx2", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    ("sse4_2", {"sse4_2", "ssse3", "popcnt", "cx16"}),
)
# Beyond a level: what compilers and oneDNN choose kernels by. Flags of security or power say nothing about code.
_EXTRAS = {
    "x86": ("avx512", "avx10", "avx_", "amx_", "gfni"),
    "arm": ("asimddp", "asimdhp", "bf16", "fphp", "i8mm", "sme", "sve"),
}


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
        sizes = self.shape[1:] if self.shape[:1] == (None,) else self.shape
        if not isinstance(self.shape, tuple) or not all(type(size) is int and size > 0 for size in sizes):
            why = "it is a tuple of sizes >= 1, with None for the batch in front only"
            raise EngineError(f"the shape {self.shape!r} of {self.name!r} cannot be used", why, "correct it")
        if self.dtype not in DTYPES:
            todo = f"use one of {', '.join(DTYPES)}"
            raise EngineError(f"the dtype {self.dtype!r} of {self.name!r} cannot be used", "it is unknown", todo)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {self.shape_text()}"

    def shape_text(self) -> str:
        return f"[{', '.join('B' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class EngineSpec:
    """All that changes the compiled bytes of one engine, and nothing else.

    network: "unet", "decode", "decode_vjp", "gradient", "image_moments", "image_gradient" or "pixel_gradient".
    graph: SHA-256 of the graph, every node with its arguments, without weights.
    weights: SHA-256 of the name, dtype, shape and bytes of every constant.
    inputs, outputs: in the order of the call. batch: smallest, planned, largest. dtype: of the networks.
    backend: its name. versions: of the packages that change compiled bytes; flags: options that do; both sorted by
    name (`pairs`). device: an architecture, as `cpu_architecture` writes it or "cuda sm_90 NVIDIA H100 80GB HBM3".
    Raises EngineError on values that no engine can have.
    """

    network: str
    graph: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]
    dtype: str
    backend: str
    versions: tuple[tuple[str, str], ...]
    device: str
    flags: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for field in ("network", "graph", "weights", "dtype", "backend", "device"):
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
        batch = self.batch
        if not isinstance(batch, tuple) or len(batch) != 3 or not all(type(size) is int for size in batch):
            raise _bad("batch", batch, f"it is a tuple of three sizes: {', '.join(_BATCH)}")
        if not 1 <= batch[0] <= batch[1] <= batch[2]:
            raise _bad("batch", batch, "1 <= smallest <= planned <= largest")
        for field in ("versions", "flags"):
            if not _is_pairs(getattr(self, field)):
                raise _bad(field, getattr(self, field), "it is pairs of strings, sorted by name, every name used once")

    def key(self) -> str:
        """The engine's name in the store: 24 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:24]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: what `from_json` reads back as an equal spec."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Raises EngineError where fields are missing, unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        if not isinstance(plain, Mapping) or sorted(plain) != sorted(names):
            found = ", ".join(sorted(plain)) if isinstance(plain, Mapping) else repr(plain)
            raise _unreadable(f"its fields are {found or 'none'}; wanted are {', '.join(sorted(names))}")
        try:
            values = dict(plain)
            for field in ("inputs", "outputs"):
                values[field] = tuple(_tensor(tensor) for tensor in plain[field])
            for field in ("versions", "flags"):
                values[field] = tuple((name, value) for name, value in plain[field])
            values["batch"] = tuple(plain["batch"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EngineError):
                raise
            raise _unreadable(f"{type(error).__name__}: {error}") from None


def pairs(mapping: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """A mapping as `EngineSpec.versions` and `.flags` hold it: strings, sorted by name."""
    return tuple(sorted((name, str(value)) for name, value in mapping.items()))


def canonical_json(plain: object) -> str:
    """One text per value, on every machine: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def differences(a: EngineSpec, b: EngineSpec) -> list[tuple[str, str, str]]:
    """Every differing field as (field, value in a, value in b), in the order of the fields; [] for equal specs.

    Fields inside a field are written "versions.torch", "flags.freezing", "batch.planned", "inputs.z.shape"; "inputs"
    alone is the names in order. What one of them lacks is "(absent)".
    """
    return differing(_flat(a), _flat(b))


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, value in a, value in b) where two flat mappings differ, "(absent)" for what is missing."""
    names = [*a, *(name for name in b if name not in a)]
    return [
        (name, a.get(name, ABSENT), b.get(name, ABSENT))
        for name in names
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


def kind_of(device: object) -> str:
    """The kind of a device as torch writes it ("cuda:1") or as a spec does ("cuda sm_89 NVIDIA L4"): "cuda"."""
    return str(device).replace(":", " ").partition(" ")[0]


def cpu_architecture() -> str:
    """This CPU as far as compiled code depends on it, such as "cpu x86_64 avx2"; reads Linux's /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return " ".join(("cpu", platform.machine(), platform.processor())).strip()
    return describe_cpu(platform.machine(), text)


def describe_cpu(machine: str, cpuinfo: str) -> str:
    """The words "cpu", the machine, the widest vector level and what goes beyond it, from the text of /proc/cpuinfo."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break  # one core speaks for all
    level, known = next(((name, needs) for name, needs in _X86_LEVELS if needs <= flags), ("", set[str]()))
    family = "x86" if machine.lower() in ("x86_64", "amd64") else "arm"
    extras = [flag for flag in flags - known if flag.startswith(_EXTRAS[family])]
    return " ".join(filter(None, ("cpu", machine, level, *sorted(extras))))


def _flat(spec: EngineSpec) -> dict[str, str]:
    flat: dict[str, str] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("inputs", "outputs"):
            flat[field.name] = ", ".join(tensor.name for tensor in value)
            for tensor in value:
                flat[f"{field.name}.{tensor.name}.shape"] = tensor.shape_text()
                flat[f"{field.name}.{tensor.name}.dtype"] = tensor.dtype
        elif field.name == "batch":
            flat.update({f"batch.{name}": str(size) for name, size in zip(_BATCH, value, strict=True)})
        elif field.name in ("versions", "flags"):
            flat.update({f"{field.name}.{name}": item for name, item in value})
        else:
            flat[field.name] = value
    return flat


def _tensor(plain: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**plain, "shape": tuple(plain["shape"])})


def _is_pairs(value: object) -> bool:
    if not isinstance(value, tuple):
        return False
    for pair in value:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(item, str) for item in pair)):
            return False
    names = [name for name, _ in value]
    return names == sorted(set(names))


def _bad(field: str, value: object, why: str) -> EngineError:
    return EngineError(f"the engine spec's {field} cannot be {value!r}", why, "correct it")


def _unreadable(why: str) -> EngineError:
    return EngineError("the engine spec cannot be read", why, "rebuild the engine with dfkd-engines build")
