"""GPU architectures that an engine is compiled for on another machine, as EngineSpec.device holds them.

A device that is there has a name, "cuda sm_89 NVIDIA GeForce RTX 4090"; a family of targets has none,
"cuda sm_86+sm_89+sm_120". Nothing here imports torch.
"""

import re
from collections.abc import Sequence

from dfkd_engine.errors import EngineError


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
    """Whether an engine of the family ``built_for`` can run on ``device``, which is there."""
    words = device.split()
    return words[0] == "cuda" and len(words) > 2 and words[1] in targets_of(built_for)
