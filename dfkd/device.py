"""Where to compute, by name."""

import torch

from dfkd.errors import UsageError


def device_of(name: str, local_rank: int, neighbours: int) -> torch.device:
    """The device of one of ``neighbours`` processes on this machine: auto and cuda are the GPU of its local rank.

    Raises UsageError as resolve_device does, and for a GPU that they would share.
    """
    device = resolve_device(name)
    if device.type != "cuda" or neighbours == 1:
        return device
    if device.index is not None:
        raise UsageError(
            f"--device {name} with several processes", "each takes the GPU of its own rank", "use --device cuda"
        )
    if neighbours > torch.cuda.device_count():
        raise UsageError(
            f"torchrun starts {neighbours} processes here",
            f"torch sees {torch.cuda.device_count()} GPUs, and each process takes one",
            "lower --nproc-per-node, or use --device cpu",
        )
    return torch.device("cuda", local_rank)


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
