"""The index beside a shard: where the bytes of each file in it begin. DALI's readers.webdataset takes it.

    shard-00000.idx    v1.2 N, then a line for each of N samples: extension, offset, size and name of each of its files

It is what DALI's own wds2idx writes, and follows from the shard alone.
"""

import tarfile
from pathlib import Path

from dfkd.files import replace_text

VERSION = "v1.2"


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def write_index(shard: Path) -> None:
    replace_text(index_path(shard), index_of(shard))


def repair_index(shard: Path) -> None:
    """Write the index where it is absent or not the shard's; nothing where the shard itself is damaged."""
    try:
        wanted = index_of(shard)
    except (tarfile.TarError, OSError):
        return
    path = index_path(shard)
    if not path.exists() or path.read_bytes() != wanted.encode():
        replace_text(path, wanted)


def index_of(shard: Path) -> str:
    """The text of the index; raises tarfile.TarError or OSError for a file that is no whole tar file."""
    lines: dict[str, list[str]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, extension = member.name.partition(".")
            lines.setdefault(stem, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    return "\n".join([f"{VERSION} {len(lines)}", *(" ".join(parts) for parts in lines.values())]) + "\n"
