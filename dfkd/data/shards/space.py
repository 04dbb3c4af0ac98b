"""Does the disk hold what is asked for?"""

import shutil
from pathlib import Path

from dfkd.errors import UsageError


def required_bytes(count: int, size: int, image_format: str) -> int:
    """An upper estimate of the disk space of ``count`` images of ``size`` x ``size``: pixels that do not compress.

    For JPEG a half of the raw size and its header are reckoned, which photos stay below and pure noise does not.
    """
    raw = 3 * size * size
    pixels = raw // 2 + 1024 if image_format == "jpg" else raw + raw // 100 + 256
    # Three tar headers with padding, and a record with the losses of some hundred steps.
    return count * (pixels + 3 * 1024 + 4096)


def require_space(folder: Path, count: int, size: int, image_format: str) -> None:
    """Raise UsageError when the disk of ``folder`` (which need not exist yet) cannot hold the images asked for."""
    needed = required_bytes(count, size, image_format)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{count} images of {size}x{size} as {image_format} need up to {needed / 1e9:.2f} GB",
            f"the disk of {existing} has {free / 1e9:.2f} GB free",
            "free some space, choose another --out, or ask for fewer images",
        )
