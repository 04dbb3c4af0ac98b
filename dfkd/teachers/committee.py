"""Several teachers as one classifier of all their classes, which are matched by name.

    t_c(x) = sum_k w_k (l_kc(x) - mean_c' l_kc'(x)) / sum_k w_k        over the members k that know the class c

Each member is shown the images at its own size, by its own normalisation. Logits l_k are averaged and not
probabilities: where a member knows none of the classes in an image its logits are low, and its probabilities are not.
Their mean is taken off because a constant in all logits of a member, which its softmax does not see, would count here.
arXiv 1904.06062 has other ways to unify them.

Still, no member was trained to compare its classes with another's. Where an image's class y is known, `told` goes by
the members that know y alone; FedCADO (arXiv 2311.08870) guides so.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.teachers.classifier import Classifier

LEAST = 1e-12  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Member:
    """A teacher among several. name: for people and records. classes: the places of its classes among all. weight: of
    what it says, > 0."""

    name: str
    classifier: Classifier
    classes: tuple[int, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"the teacher {self.name} has the weight {self.weight:g}", "a weight is a number above 0")

    def own(self, labels: Tensor) -> Tensor:
        """Labels of all classes, int64 [B] -> the member's own, -1 for a class that it does not know."""
        same = labels[:, None] == torch.tensor(self.classes, device=labels.device)
        return torch.where(same.any(1), same.int().argmax(1), -1)


@dataclass(frozen=True)
class Committee(Classifier):
    """Several teachers as one classifier: images in 0..1 at the largest member's size -> t, logits [B, classes].

    members: in the order that their classes were first met. Made by `of`; its digest is that of members and weights.
    """

    members: tuple[Member, ...] = ()

    @classmethod
    def of(
        cls, classifiers: Sequence[Classifier], weights: Sequence[float] | None = None, names: Sequence[str] = ()
    ) -> Self:
        """A committee over the union of the class names, in the order of first appearance.

        weights: one each, 1 where not given. names: of the members, their sources where not given.
        Raises UsageError: none, a weight that is none, or classes that differ by case or spaces alone.
        """
        if not classifiers or len(weights or classifiers) != len(classifiers):
            raise UsageError(f"{len(classifiers)} teachers, {len(weights or ())} weights", "each has one weight")
        union = tuple(dict.fromkeys(name for one in classifiers for name in one.class_names))
        met: dict[str, str] = {}
        for name in union:
            if (other := met.setdefault("".join(name.casefold().split()), name)) != name:
                why = "one word each would be two classes to the student"
                raise UsageError(f"classes {other!r} and {name!r} of two teachers", why, "name both alike")
        members = tuple(
            Member(
                names[k] if names else one.source or f"teacher {k + 1}",
                one,
                tuple(union.index(name) for name in one.class_names),
                float(weights[k] if weights else 1.0),
            )
            for k, one in enumerate(classifiers)
        )
        side = max(one.input_size for one in classifiers)
        return cls(Voices(members, len(union)), union, (0.0,) * 3, (1.0,) * 3, side, "committee", members=members)

    def last_linear(self) -> None:
        """None: each member has one of its own."""

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(member.classifier.source for member in self.members)

    def knowing(self, label: int) -> tuple[Member, ...]:
        """The members that know a class."""
        return tuple(member for member in self.members if label in member.classes)

    def shares(self, labels: Tensor) -> Tensor:
        """Weights [members, B] of the members in images of these classes, int64 [B]: they add up to 1 over those that
        know the class, and are 0 for the others."""
        known = torch.stack([member.own(labels) >= 0 for member in self.members])
        weights = torch.tensor([member.weight for member in self.members], device=labels.device)[:, None] * known
        return weights / weights.sum(0)

    def told(self, logits: Sequence[Tensor], labels: Tensor, temperature: float = 1.0) -> Tensor:
        """p(c | x) [B, classes] by the members that know the image's class; rows add up to 1.

        logits: of each member [B, its classes], softened by the temperature. labels: int64 [B].
        """
        shares, found = self.shares(labels), logits[0].new_zeros(len(labels), len(self.class_names))
        for member, own, share in zip(self.members, logits, shares, strict=True):
            places = torch.tensor(member.classes, device=labels.device)
            found = found.index_add(1, places, share[:, None].to(own) * (own / temperature).softmax(1))
        return found

    def label_probability(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = [member.classifier.logits(images).float() for member in self.members]
        return self.told(logits, labels).gather(1, labels[:, None])[:, 0]

    def answers(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = [member.classifier.logits(images.to(self.device).float() / 255).float() for member in self.members]
        return self.told(logits, labels.to(self.device)).clamp_min(LEAST).log()

    def digest(self) -> str:
        parts = [f"{m.classifier.digest()} {m.weight} {m.classifier.class_names}" for m in self.members]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def described(self) -> str:
        lines = [f"{member.name}: {member.classifier.described()}" for member in self.members]
        return f"{len(self.members)} of {len(self.class_names)} classes in all; " + "; ".join(lines)

    def replace(self, **fields: Any) -> Any:
        """A copy with some fields replaced; with another module it is one network, fed as the committee is."""
        if "module" not in fields:
            return super().replace(**fields)
        kept = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(Classifier)}
        return Classifier(**{**kept, **fields})

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Raises UsageError: several teachers are no network of one file."""
        todo = "save its members, or distil a student of them"
        raise UsageError("several teachers cannot be saved as one", "each has its own network", todo)


class Voices(nn.Module):
    """The committee's network. `members.K` answers with the logits of member K, for what looks inside."""

    def __init__(self, members: Sequence[Member], classes: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(Voice(member.classifier) for member in members)
        self.count, self.places = classes, [member.classes for member in members]
        self.weights = [member.weight for member in members]

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> t [B, classes], float32 at least."""
        total = images.new_zeros(len(images), self.count, dtype=torch.promote_types(images.dtype, torch.float32))
        known = total.new_zeros(self.count)
        for member, classes, weight in zip(self.members, self.places, self.weights, strict=True):
            places, logits = torch.tensor(classes, device=images.device), member(images).to(total)
            total = total.index_add(1, places, weight * (logits - logits.mean(1, keepdim=True)))
            known = known.index_add(0, places, torch.full_like(places, weight, dtype=known.dtype))
        return total / known


class Voice(nn.Module):
    """A member's network, with its preparation of images in 0..1."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.module
        self._prepare = classifier.prepare

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self._prepare(images))
        return logits
