"""What makes labelled images: the protocol of guided diffusion, DeepInversion, noise and methods of your own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from dfkd.data import Record


@dataclass(frozen=True)
class Sample:
    """Labelled images in the order of the ids that were asked for.

    images: uint8 [N, 3, H, W] on the CPU. labels: int64 [N] on the CPU. records: what is known of each image.
    """

    images: Tensor
    labels: Tensor
    records: "tuple[Record, ...]"

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
        update(student)             take a newer student, for methods that go by what it does not know yet
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
