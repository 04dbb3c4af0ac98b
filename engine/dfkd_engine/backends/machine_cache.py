"""What a compiler learns about this machine, kept for the next time: timings of kernels, kernels compiled at load.

It lies in the user's cache folder, as CUDA's own does: it belongs to a GPU and a driver, not to an engine, and no
engine depends on it. What is lost or cannot be written costs time and nothing else.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from dfkd_engine.files import replace_file


def place(*words: str) -> Path:
    """The file of what is known under these words, such as a library, its version and a device."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dfkd" / re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(words))


def read(file: Path) -> bytes:
    """Its bytes, b"" where there are none."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def write(file: Path, content: bytes) -> None:
    """Replace it whole."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda stream: stream.write(content))
