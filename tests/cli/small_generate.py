"""Small networks on disk, and a command run in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dfkd.teachers import Classifier, build

CLASS_NAMES = ("zero", "one", "two")
SMALL = ("--count", "4", "--group", "4", "--steps", "3", "--cutmix-every", "0", "--device", "cpu")


def save_classifier(
    folder: Path, seed: int = 0, names: tuple[str, ...] = CLASS_NAMES, size: int = 16, architecture: str = "resnet8"
) -> Path:
    """A folder of `Classifier.save_pretrained`, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(architecture, len(names))
    half = (0.5, 0.5, 0.5)
    Classifier(module, names, half, (0.25, 0.25, 0.25), size, architecture).save_pretrained(folder)
    return folder


def status_of(main: Callable[[list[str]], None], *argv: object) -> int:
    """The exit status of a command's main()."""
    try:
        main([str(word) for word in argv])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def shards_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every shard of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


def last_line(text: str) -> dict[str, Any]:
    """The JSON that ends a command's output."""
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found
