"""What compiled code depends on in a device, as `EngineSpec.device` holds it.

    cpu x86_64 avx2                            the machine's vector level
    cuda sm_90 NVIDIA H100 80GB HBM3           a GPU that is there
    cuda sm_86+sm_89                           a family of GPUs that an engine is compiled for without having one

Nothing here imports torch until a GPU is asked about.
"""

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_engine.errors import EngineError

if TYPE_CHECKING:
    import torch

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


def kind_of(device: object) -> str:
    """The kind of a device as torch writes it ("cuda:1") or as a spec does ("cuda sm_89 NVIDIA L4"): "cuda"."""
    return str(device).replace(":", " ").partition(" ")[0]


def architecture(device: "torch.device | str") -> str:
    """A device that is there, such as "cpu x86_64 avx2" or "cuda sm_90 NVIDIA H100 80GB HBM3"."""
    if kind_of(device) != "cuda":
        return cpu_architecture()
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"cuda sm_{properties.major}{properties.minor} {properties.name}"


def cpu_architecture() -> str:
    """The CPU as far as compiled code depends on it, such as "cpu x86_64 avx2"; reads Linux's /proc/cpuinfo."""
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


def family(targets: Sequence[str]) -> str:
    """Targets such as ("sm_89", "sm_86") as one device, "cuda sm_86+sm_89". Raises EngineError for other words."""
    if wrong := [target for target in targets if not re.fullmatch(r"sm_\d{2,3}", target)]:
        raise EngineError(f"the target {wrong[0]!r} is unknown", "a target is a GPU architecture", "write it as sm_89")
    return "cuda " + "+".join(sorted(set(targets), key=lambda target: int(target.removeprefix("sm_"))))


def targets_of(device: str) -> tuple[str, ...]:
    """The targets of a family; () for a device that is there."""
    words = device.split()
    return tuple(words[1].split("+")) if len(words) == 2 and words[0] == "cuda" else ()


def covers(built_for: str, device: str) -> bool:
    """True if an engine compiled for the family `built_for` can run on `device`, which is there."""
    words = device.split()
    return words[0] == "cuda" and len(words) > 2 and words[1] in targets_of(built_for)
