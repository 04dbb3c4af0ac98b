"""Clean estimates along a trajectory as images of their own, beside the finished one (DiffDFKD, arXiv 2504.00870).

Of S steps and N intermediates these are z0hat behind the steps S // (N + 1), 2 (S // (N + 1)), ..., N (S // (N + 1)),
decoded. Image i is snapshot i % (N + 1) of trajectory i // (N + 1), the last snapshot being the finished image; label,
prompt and noise are the trajectory's, whose number is what the pipeline takes for an id.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dfkd.data import Record
from dfkd.errors import UsageError
from dfkd.synthesis.pack import Pack
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.synthesizer import Around, Sample, Synthesizer


class Intermediates(Around):
    """A synthesizer around guided diffusion: `count` clean estimates of every trajectory, and its finished image.

    count: at least 1 and below the number of steps. snapshots: images of a trajectory. group: images of the
    trajectories that interact. A refinement of pixels is of the finished image alone.

    Raises UsageError: the method has no denoising steps.
    """

    def __init__(self, inner: Synthesizer, count: int) -> None:
        super().__init__(inner)
        if not isinstance(inner, GuidedPipeline):
            why = "it has no denoising steps whose estimates could be kept"
            raise UsageError(f"--keep-intermediates {count} with --method {inner.name}", why, "leave it out")
        self.pipe, self.snapshots, self.group = inner, count + 1, inner.group * (count + 1)
        self.kept = kept_steps(len(inner.table), count)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """The images `ids`, in that order. Arguments and errors as of GuidedPipeline, and UsageError: two labels for
        the images of one trajectory."""
        asked = self.pipe.checked(ids, labels)
        found: dict[int, tuple[Tensor, Record]] = {}
        for pack in self.pipe.packs(self._trajectories(asked), seed):
            pack.keep, pack.named = frozenset(self.kept), pack.ids * self.snapshots + len(self.kept)
            finished = self.pipe.finished(pack)
            for place in range(self.snapshots):
                ids_of = [t * self.snapshots + place for t in pack.ids.tolist()]
                if asked.keys().isdisjoint(ids_of):
                    continue
                drawn, records = finished if place == len(self.kept) else self._kept(pack, self.kept[place])
                named = [self._renamed(record, place) for record in records]
                found |= {record.id: (drawn[n], record) for n, record in enumerate(named) if record.id in asked}
        images = torch.stack([found[i][0] for i in asked])
        ordered = tuple(found[i][1] for i in asked)
        return Sample(images, torch.tensor([record.label for record in ordered]), ordered)

    def _kept(self, pack: Pack, step: int) -> tuple[Tensor, list[Record]]:
        """Images uint8 [B, 3, H, W] of the estimates behind a step, on the CPU, and their records."""
        clean = pack.kept[step]
        return self.pipe.stored(pack, clean, pack.decode(clean), step)

    def _renamed(self, record: Record, place: int) -> Record:
        """A trajectory's record as that of its image `place`; its partner is the partner's image at the same place."""
        partner = None if record.partner is None else record.partner * self.snapshots + place
        return replace(record, id=record.id * self.snapshots + place, partner=partner)

    def _trajectories(self, asked: dict[int, int | None]) -> dict[int, int | None]:
        """The trajectories of the asked images, with their labels where they are given."""
        found: dict[int, int | None] = {}
        for image, label in asked.items():
            if found.setdefault(trajectory := image // self.snapshots, label) != label:
                why = f"images {trajectory * self.snapshots} to {(trajectory + 1) * self.snapshots - 1} are of one"
                todo = "give all images of a trajectory its label"
                raise UsageError(f"labels {found[trajectory]} and {label} in one trajectory", why, todo)
        return found


def kept_steps(steps: int, count: int) -> tuple[int, ...]:
    """The denoising steps, counted from 0, behind which `count` clean estimates of a trajectory are kept."""
    return tuple(k * (steps // (count + 1)) - 1 for k in range(1, count + 1))
