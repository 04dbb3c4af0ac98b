"""What is left of a shard whose bytes are not those that the manifest has on record."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfkd.data.shards.codec import decode
from dfkd.data.shards.layout import Layout, Record, record_of


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be used, and why."""

    file: Path
    id: int
    why: str


@dataclass(frozen=True)
class Entry:
    """Where one image's bytes lie."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises ValueError where the file has come to an end before the image has."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"the file ends {self.size - len(data)} bytes before it")
        return data


def examine(file: Path, ids: range, layout: Layout) -> tuple[list[tuple[Entry, Record]], list[BadSample]]:
    """The samples of one shard that are whole, each decoded once, and the others; both in the order of their ids."""
    members, end = _members(file)
    good, bad = [], []
    for number in ids:
        try:
            image, text = (members[f"{number:08d}.{extension}"] for extension in (layout.image_format, "json"))
            record = record_of(json.loads(text.read()))
            shape = decode(image.read(), layout.image_format).shape
            if record.id != number or shape != (layout.image_size, layout.image_size, 3):
                raise ValueError(f"it is image {record.id} of shape {shape}")
            good.append((image, record))
        except KeyError:
            bad.append(BadSample(file, number, f"absent: {end}"))
        except (OSError, ValueError, TypeError) as error:
            bad.append(BadSample(file, number, str(error)))
    return good, bad


def in_words(bad: Sequence[BadSample], most: int = 10) -> str:
    """Files and ids, the reasons of the first ``most``."""
    named = [f"{sample.file}: image {sample.id} ({sample.why})" for sample in bad[:most]]
    rest = [f"and the images {', '.join(str(sample.id) for sample in bad[most:])}"] if len(bad) > most else []
    return "; ".join(named + rest)


def _members(file: Path) -> tuple[dict[str, Entry], str]:
    """The files in a tar file up to where it can be read, by name, and why it ends there."""
    found: dict[str, Entry] = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                found[member.name] = Entry(file, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        return found, str(error)
    return found, "the shard does not hold it"
