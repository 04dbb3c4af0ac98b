"""dfkd-generate on a small prior and a small teacher, in this process."""

import json
from pathlib import Path
from typing import Any

import torch

from dfkd.data.shards import Pool, read_folder
from dfkd.teachers import Classifier, build, checkpoint

CLASS_NAMES = ("zero", "one", "two")
SMALL = ("--count", "4", "--group", "4", "--steps", "3", "--cutmix-every", "0", "--device", "cpu")


def save_classifier(
    folder: Path, seed: int = 0, names: tuple[str, ...] = CLASS_NAMES, size: int = 16, architecture: str = "resnet8"
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(architecture, len(names))
    checkpoint.save(folder, Classifier(module, architecture, names, size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    return folder


def status_of(main: Any, *argv: object) -> int:
    """The exit status of a command's main()."""
    try:
        main([str(word) for word in argv])
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError("main() did not exit")


def images_of(folder: Path) -> Pool:
    return read_folder(folder)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


def last_line(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found
