"""Images that are there already, as they are: an unlabelled pool of one's own, or a control without any synthesis.

Each comes once, in an order that follows from the seed, so that the first ones are a sample of all classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.config.fields import Config, option
from dfkd.data import MANIFEST, ImageFiles, Listing, ShardPool, list_file, list_folder, open_folder, resize
from dfkd.data.class_folders import images_below
from dfkd.errors import UsageError
from dfkd.runtime import generator
from dfkd.synthesis.methods.groups import settings_for
from dfkd.synthesis.prompts import chosen_classes
from dfkd.synthesis.synthesizer import Sample, label_probability, own_size, records_of
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What stands in the parentheses of `folder(path="my/images")`. Raises ValueError for values out of range."""

    path: Path | None = option(None, "folder of images, of class folders or of shards, or a list file")
    labels: str = option(
        "teacher",
        "teacher: its likeliest class; folder: by class folder, list or record, classes matched by name",
        choices=("teacher", "folder"),
    )

    def validate(self) -> None:
        if self.path is None:
            raise ValueError('path is missing: give the folder, as in folder(path="my/images")')


class Folder:
    """Synthesizer of the images of a folder. Raises UsageError: there is none, or classes are not the teacher's."""

    name, group, needs_prior, takes_clients = "folder", 1, False, True
    reads = ("size", "only")

    def __init__(self, prior: Prior | None, teacher: Classifier, config: GenerateConfig, **settings: Any) -> None:
        self.settings = own = settings_for(Settings, config, settings)
        assert own.path is not None
        self.teacher, self.call_size = teacher.tried(), config.batching.batch
        self.class_names, self.image_size = teacher.class_names, own_size(config, teacher)
        self.classes = chosen_classes(teacher.class_names, config.sampling.only)
        if own.labels == "teacher" and config.sampling.only:
            what = f"--only {','.join(config.sampling.only)} with folder(labels=teacher)"
            raise UsageError(what, "what the teacher calls an image is known once it is made", "use labels=folder")
        self.images = opened(own.path, own.labels == "folder", self.class_names, self.image_size)
        self.labels = self.images.labels
        if own.labels == "folder":
            if isinstance(self.images, ShardPool):
                self.labels = _in_order(self.images, self.class_names, own.path)
            self.positions = torch.isin(self.labels, torch.tensor(self.classes)).nonzero()[:, 0]
        else:
            self.positions = torch.arange(len(self.labels))

    @property
    def available(self) -> int:
        """How many images there are."""
        return len(self.positions)

    def identity(self) -> Mapping[str, Any]:
        """The images' bytes, where labels are from, size, classes and the teacher, and not the folder's place."""
        settings = {"labels": self.settings.labels, "size": self.image_size, "classes": list(self.classes)}
        return {**settings, "images": self.images.digest, "teacher_digest": self.teacher.digest()}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """The images `ids`, in that order; labels: instead of the folder's or the teacher's.

        Raises UsageError for an id beyond the images, and for a file that cannot be read.
        """
        asked = [int(i) for i in ids]
        if max(asked, default=0) >= self.available:
            raise UsageError(f"image {max(asked)} of {self.settings.path}", f"it has {self.available}", "lower --count")
        order = torch.randperm(self.available, generator=generator(seed, self.name, 0))
        places = self.positions[order[asked]]
        images = resize(self.images.read(places), self.image_size)
        found = self._labels(images, places) if labels is None else torch.as_tensor(list(labels))
        sure = label_probability(self.teacher, images, found, self.call_size)
        return Sample(images, found, records_of(asked, found, self.class_names, seed, sure))

    @torch.no_grad()
    def _labels(self, images: Tensor, places: Tensor) -> Tensor:
        if self.settings.labels == "folder":
            return self.labels[places]
        device = self.teacher.device
        parts = torch.split(images, self.call_size)
        return torch.cat([self.teacher.logits(part.to(device).float() / 255).argmax(1).cpu() for part in parts])


def opened(path: Path, labelled: bool, class_names: tuple[str, ...], size: int) -> ShardPool | ImageFiles:
    """The images at a path, of `size` pixels unless they are shards; those of a listing that is `labelled` have its
    labels, in the order of `class_names`.

    Raises UsageError: no folder, no image, or classes that are not among `class_names`.
    """
    if (path / MANIFEST).exists():
        return open_folder(path)
    if path.is_file():
        listing = list_file(path)
    elif labelled:
        listing = list_folder(path, complete=False)
    elif not path.is_dir():
        raise UsageError(f"no folder {path}", "method folder takes its images from there", "correct the path")
    else:
        files = images_below(path)
        listing = Listing(files, [0] * len(files), ("unlabelled",), place=str(path))
    if labelled and not listing.numbered:
        listing = listing.ordered(class_names, "the teacher")
    elif labelled and len(listing.class_names) > len(class_names):
        what = f"{path} has the label {len(listing.class_names) - 1}"
        raise UsageError(what, f"the teacher has {len(class_names)} classes, numbered from 0", "give its own list")
    elif labelled:
        listing = replace(listing, class_names=class_names)
    return ImageFiles(listing.check(), size)


def _in_order(pool: ShardPool, class_names: tuple[str, ...], path: Path) -> Tensor:
    """Labels int64 [N] of a folder of shards in the order of the teacher's classes, matched by name."""
    if unknown := [name for name in pool.class_names if name not in class_names]:
        what = f"{path} has images of {', '.join(unknown[:10])}"
        raise UsageError(what, f"the teacher's classes are {', '.join(class_names[:10])}", "use labels=teacher")
    return torch.tensor([class_names.index(name) for name in pool.class_names])[pool.labels]
