"""One teacher an image: group g is guided by member g mod K of a committee, about the classes that it knows, in turn.

Each group is exactly one of that teacher alone (FedCADO's way, arXiv 2311.08870: so many images of every class and
client), so whatever a pipeline can do, it does here. The prior's networks are shared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dfkd.config import GenerateConfig
from dfkd.data import Record
from dfkd.errors import UsageError
from dfkd.synthesis.joint import about
from dfkd.synthesis.prompts import chosen_classes, labels_of
from dfkd.synthesis.synthesizer import Sample, Synthesizer
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee, Member

# (config, teacher, student) -> the synthesizer of one member, on the prior of all.
Make = Callable[[GenerateConfig, Classifier, Classifier | None], Synthesizer]


class EachTeacher:
    """A synthesizer of several teachers' images; a member none of whose classes are asked for guides none.

    Raises UsageError: a class of `--only` that nobody knows.
    """

    name = "guided"

    def __init__(self, make: Make, config: GenerateConfig, committee: Committee, student: Classifier | None) -> None:
        self.classes = chosen_classes(committee.class_names, config.sampling.only)
        asked = set(self.classes)
        self.config, self.committee = config, committee
        self.members = [member for member in committee.members if asked & set(member.classes)]
        self.pipes: list[Any] = []
        for member in self.members:
            only = tuple(committee.class_names[c] for c in member.classes if c in asked)
            own = config.replace(only=only if config.sampling.only else (), teaching="joint")  # alone, it is one of one
            self.pipes.append(make(own, member.classifier, about(student, member)))
        first = self.pipes[0]
        self.class_names, self.image_size = committee.class_names, int(first.image_size)
        self.group = max(pipe.group for pipe in self.pipes)
        self.prior, self.kernels = first.prior, first.kernels

    @property
    def turn(self) -> int:
        """Ids after which teachers, and labels of the same teacher, come again."""
        return int(self.group) * len(self.members) * len(self.classes)

    @property
    def call_size(self) -> int:
        """Images per network call."""
        return int(self.pipes[0].call_size)

    @call_size.setter
    def call_size(self, images: int) -> None:
        for pipe in self.pipes:
            pipe.call_size = images

    def update(self, student: Classifier | None) -> None:
        """Replace the student of the adversarial loss."""
        for member, pipe in zip(self.members, self.pipes, strict=True):
            pipe.update(about(student, member))

    def identity(self) -> Mapping[str, Any]:
        """What the images follow from: a pipeline's, with all the teachers."""
        own = {"teacher_digest": self.committee.digest(), "only": self._only(), "teaching": "each"}
        return {**self.pipes[0].identity(), **own}

    def choose_engines(self) -> None:
        """Raise where no engines would be found for one of the teachers."""
        for pipe in self.pipes:
            pipe.choose_engines()

    def use_engines(self, before: Mapping[str, str] | None) -> dict[str, str]:
        """Load each teacher's engines: {"K/network": key}, K its place. Arguments and errors as of GuidedPipeline."""
        found: dict[str, str] = {}
        for k, pipe in enumerate(self.pipes):
            place, own = f"{k}/", None
            if before is not None:
                own = {name.removeprefix(place): key for name, key in before.items() if name.startswith(place)}
            found |= {f"{place}{network}": key for network, key in pipe.use_engines(own).items()}
        return found

    def describe(self) -> list[str]:
        """Lines for people."""
        lines = [f"teachers in turn, a group each: {', '.join(member.name for member in self.members)}"]
        if len({member.weight for member in self.members}) > 1:
            lines.append("their weights do not act on images that have one teacher each; on the student they do")
        for pipe in self.pipes:  # what is the same for all is said once
            lines += [line for line in pipe.describe() if line not in lines]
        return lines

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """The images `ids`, in that order. labels: theirs, among all classes.

        Raises UsageError for a label that the image's teacher does not know.
        """
        asked = [int(i) for i in ids]
        given = {} if labels is None else dict(zip(asked, map(int, labels), strict=True))
        found: dict[int, tuple[torch.Tensor, Record]] = {}
        for k, (member, pipe) in enumerate(zip(self.members, self.pipes, strict=True)):
            own = [i for i in asked if i // self.group % len(self.members) == k]
            if not own:
                continue
            told = [self._label(i, member, pipe, given.get(i)) for i in own]
            sample = pipe(own, labels=told, seed=seed)
            for image, record in zip(sample.images, sample.records, strict=True):
                label = member.classes[record.label]
                found[record.id] = image, replace(record, label=label, teachers=(member.name,))
        images, records = zip(*(found[i] for i in asked), strict=True)
        return Sample(torch.stack(images), torch.tensor([record.label for record in records]), records)

    def _label(self, image: int, member: Member, pipe: Any, given: int | None) -> int:
        """An image's label as its member counts them."""
        if given is not None:
            if given not in member.classes:
                why = f"its teacher is {member.name}, which knows {', '.join(member.classifier.class_names[:10])}"
                raise UsageError(f"label {given} for image {image}", why, "ask for another image, or guide jointly")
            return member.classes.index(given)
        snapshots = getattr(pipe, "snapshots", 1)
        group = self.group // snapshots
        number = image // self.group // len(self.members) * group + image % self.group // snapshots  # of its own
        classes = chosen_classes(pipe.class_names, pipe.config.sampling.only)
        pairs = group if self.config.cutmix.every else 0
        return int(labels_of(torch.tensor([number]), classes, pairs)[0])

    def _only(self) -> list[str]:
        return list(self.config.sampling.only)
