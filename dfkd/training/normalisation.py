"""BatchNorm of a student whose batch is spread over processes."""

from torch import nn

from dfkd.training.world import World
from dfkd.errors import UsageError


def check_sync_bn(wanted: str, world: World) -> None:
    """Raise UsageError where statistics over all processes were asked for and cannot be had."""
    if wanted == "on" and world.size > 1 and world.device.type != "cuda":
        raise UsageError(
            f"--sync-bn on on {world.device.type}",
            "torch's SyncBatchNorm is for GPUs",
            "use --sync-bn off: each process then takes the statistics of its part of the batch",
        )


def synchronised(student: nn.Module, wanted: str, world: World) -> nn.Module:
    """The student, whose BatchNorm layers, replaced in place, take statistics over all processes where that acts:
    "on", or "auto" on GPUs. Its weights keep their names."""
    if world.size == 1 or wanted == "off" or (wanted == "auto" and world.device.type != "cuda"):
        return student
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
    return converted
