"""What makes labelled images: the protocol of guided diffusion, DeepInversion, noise and methods of your own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.data import Record
from dfkd.errors import UsageError
from dfkd.teachers import Classifier

LOSS_DIGITS = 5  # digits of a recorded number: the record is for reading, not for computing on


@dataclass(frozen=True)
class Sample:
    """Labelled images in the order of the ids that were asked for.

    images: uint8 [N, 3, H, W] on the CPU. labels: int64 [N] on the CPU. records: what is known of each image.
    """

    images: Tensor
    labels: Tensor
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.labels)


@runtime_checkable
class Synthesizer(Protocol):
    """Image ids -> labelled images.

    name: of the method, such as "guided". class_names: in the order of the labels. image_size: side in pixels.
    group: images that interact, 1 where each is made alone; image i belongs to group i // group.

    `generate` also looks for these, which a synthesizer may leave out:

        call_size: int              images per network call. It is set to what a continued folder has recorded, and to
                                    less where a call ran out of memory
        use_engines(before)         choose compiled engines before the first image: `before` holds those that the
                                    folder was begun with, {network: key}, or is None in a new folder. Returns
                                    {network: key} of those in use
        choose_engines()            raise where a new folder's `use_engines` would find none, before calls are planned
        snapshots: int              images of one trajectory, which have consecutive ids; a call takes as many
                                    trajectories as call_size says
        turn: int                   ids after which labels, and who guides, come again, where that is not after `group`
                                    times the classes
        available: int              how many images there are, where that is not as many as are asked for
        takes_labels: bool          False where its images have labels of their own, and none can be asked for
        prepares: tuple[str, ...]   what a folder is to have on record before the first image
        prepare(out, known, seed, say)  find that out, or take it up from what the folder `out` has on record, `known`;
                                    returns what is new, in JSON's types. In a new folder the first process does so
        on_progress: None           is set to a callable that takes the share, in 0..1, of a call that is done
        update(student)             take a newer student, for methods that go by what it does not know yet; None: there
                                    is none yet, and what goes by one rests
        state_dict()                what it has learned from its calls so far, {name: tensor}, for methods whose images
                                    follow from those before them: its groups are then made in turn, by one process
        load_state_dict(state)      take that up, in a run that continues a folder or goes on from another
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    group: int

    def identity(self) -> Mapping[str, Any]:
        """What the images follow from, beside seed and ids, in JSON's types. A folder takes images of one identity."""
        ...

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """Make the images `ids`, in that order, all of whose randomness follows from (seed, id).

        labels: overrides the label that follows from each id. Where images interact, whole groups are made and the
        asked images returned.
        """
        ...


class Around:
    """A synthesizer around another one: what it does not have itself is the inner one's.

    identity: the inner one's, to which a subclass adds its own settings.
    """

    def __init__(self, inner: Synthesizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def call_size(self) -> int:
        """Images per network call of the inner one. Raises AttributeError where it has none."""
        return int(self.inner.call_size)  # type: ignore[attr-defined]

    @call_size.setter
    def call_size(self, images: int) -> None:
        self.inner.call_size = images  # type: ignore[attr-defined]

    @property
    def on_progress(self) -> Callable[[float], object] | None:
        """Who is told the share, in 0..1, of a call of the inner one. Raises AttributeError where it does not tell."""
        return self.inner.on_progress  # type: ignore[attr-defined,no-any-return]

    @on_progress.setter
    def on_progress(self, told: Callable[[float], object] | None) -> None:
        self.inner.on_progress = told  # type: ignore[attr-defined]

    def identity(self) -> Mapping[str, Any]:
        """What the inner one's images follow from."""
        return self.inner.identity()


def innermost(synthesizer: Synthesizer) -> Synthesizer:
    """The synthesizer that makes images, inside of those that are around it."""
    while isinstance(synthesizer, Around):
        synthesizer = synthesizer.inner
    return synthesizer


def images_of_call(synthesizer: Synthesizer, call_size: int) -> int:
    """Image ids that a call takes: whole groups, with all snapshots of as many trajectories as a network call holds."""
    return max(call_size // trajectories(synthesizer), 1) * synthesizer.group


def trajectories(synthesizer: Synthesizer) -> int:
    """Trajectories of a group: its images, unless several are of one."""
    return synthesizer.group // int(getattr(synthesizer, "snapshots", 1))


def own_size(config: GenerateConfig, teacher: Classifier) -> int:
    """Side of the images of a method without a prior: --size, or else the teacher's."""
    size = config.sampling.size or teacher.input_size
    if not size:
        raise UsageError("the images have no size", "neither a prior nor the teacher states one", "give --size")
    return size


def counted(total: int, watch: Callable[[float], object] | None) -> Callable[[], None]:
    """What a method calls after each of so many steps, to tell `watch` the share that is done."""
    taken = count(1)

    def stepped() -> None:
        if watch is not None:
            watch(next(taken) / total)

    return stepped


@torch.no_grad()
def label_probability(teacher: Classifier, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """The teacher's probability [N] of each label, on the CPU.

    images: uint8 [N, 3, H, W]. labels: int64 [N]. batch: images per call.
    """
    device, labels = teacher.device, labels.to(teacher.device)
    pairs = zip(torch.split(images, batch), torch.split(labels, batch), strict=True)
    return torch.cat([teacher.label_probability(part.to(device).float() / 255, own).cpu() for part, own in pairs])


def rounded(value: float) -> float:
    """A number with as many digits as a record keeps."""
    return float(f"{value:.{LOSS_DIGITS}g}")


def records_of(
    ids: Sequence[int],
    labels: Tensor,
    class_names: Sequence[str],
    seed: int,
    probability: Tensor | None = None,
    losses: Mapping[str, Tensor] | None = None,
    curve: Mapping[str, Tensor] | None = None,
) -> tuple[Record, ...]:
    """The records of images made without a prompt.

    labels: int64 [N]. probability: the teacher's for the label [N]. losses: the final ones by name, each [N].
    curve: losses of some of the steps by name, each [N, points].
    """
    sure = [0.0] * len(labels) if probability is None else probability.tolist()
    final = {name: values.tolist() for name, values in (losses or {}).items()}
    steps = {name: values.tolist() for name, values in (curve or {}).items()}
    return tuple(
        Record(
            id=int(ids[i]),
            label=label,
            class_name=class_names[label],
            seed=seed,
            prompt="",
            losses={name: rounded(values[i]) for name, values in final.items()},
            loss_curve={name: [rounded(value) for value in values[i]] for name, values in steps.items()},
            teacher_probability=rounded(sure[i]),
        )
        for i, label in enumerate(labels.tolist())
    )
