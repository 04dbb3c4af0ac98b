"""What a folder of shards states about itself: one record per image, one manifest per folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfkd.errors import UsageError

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Record:
    """What is known of one image.

    partner and box (y0, x0, y1, x1 in latent cells) are those of the last CutMix, None without one; losses are the
    final ones by name; loss_curve holds the guidance losses of every step, rounded; teacher_probability is the
    teacher's for the label.
    """

    id: int
    label: int
    class_name: str
    seed: int
    prompt: str
    partner: int | None = None
    box: tuple[int, int, int, int] | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    loss_curve: Mapping[str, Sequence[float]] = field(default_factory=dict)
    teacher_probability: float = 0.0


def record_of(fields: Mapping[str, Any]) -> Record:
    """A record from its JSON object; raises TypeError or KeyError for another object."""
    box = fields["box"]
    return Record(**{**fields, "box": None if box is None else (box[0], box[1], box[2], box[3])})


@dataclass(frozen=True)
class Layout:
    """What every shard of a folder has in common; two runs may share a folder only when theirs are equal."""

    settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    image_size: int
    image_format: str
    count: int
    shard_size: int

    def ids(self, index: int) -> range:
        """The image ids of one shard."""
        return range(index * self.shard_size, min(self.count, (index + 1) * self.shard_size))

    def shard_count(self) -> int:
        return -(-self.count // self.shard_size)


def read_manifest(path: Path) -> tuple[Layout, list[dict[str, Any]]]:
    """The layout of a folder and its committed shards in order; raises UsageError where there is none to read."""
    todo = "give a folder written by dfkd-generate, or delete this one and generate again"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest.pop("version")
        shards = sorted(manifest.pop("shards"), key=lambda entry: str(entry["file"]))
        layout = Layout(**{**manifest, "class_names": tuple(manifest["class_names"])})
    except OSError as error:
        raise UsageError(f"cannot read {path / MANIFEST}", error.strerror or str(error), todo) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / MANIFEST} is damaged", f"{type(error).__name__} {error}", todo) from None
    if version != VERSION:
        raise UsageError(f"{path / MANIFEST} has version {version}", f"this program reads version {VERSION}", todo)
    return layout, shards
