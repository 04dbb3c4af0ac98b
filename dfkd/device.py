"""Where to compute, by name."""

import torch

from dfkd.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """auto: the GPU where there is one; raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown", "known are auto, cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported", "supported are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name} is absent", f"torch sees {torch.cuda.device_count()} GPUs", "use --device auto"
        )
    return device
