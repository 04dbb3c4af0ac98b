"""Finished images that the teacher does not read as their label under views that guidance never had.

    agreement = share of N random views v of an image with argmax T(v(x)) = y

Below the threshold an image stays in its shard, with the agreement and the reason on record, and readers leave it out.
A view shifts by up to an eighth of the side and cuts out 85 % of the side or more; it mirrors only where --guide-flip
says that classes bear it. It follows from (seed, id, number of the view).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfkd.config import FilterConfig, ViewConfig
from dfkd.synthesis.synthesizer import Around, Sample, Synthesizer, rounded
from dfkd.synthesis.views import draw, seen
from dfkd.teachers import Classifier

# Views of trajectories are numbered from 0: with views.FIRST_STREAM these have the random streams from 5 << 29 on.
FIRST_VIEW = 1 << 29
SHIFT, SHARE = 1 / 8, 0.85  # the longest shift and the least part, of a side


class Filter(Around):
    """A synthesizer around another one, whose records say which images are to be left out.

    teacher: frozen, on its device. flip: whether views are mirrored. rows: images per call of the teacher.
    """

    def __init__(self, inner: Synthesizer, config: FilterConfig, teacher: Classifier, flip: bool, rows: int) -> None:
        super().__init__(inner)
        self.own, self.teacher, self.flip, self.rows = config, teacher, flip, rows

    def identity(self) -> dict[str, Any]:
        """The method's, and the settings of the filter."""
        own = {"filter_views": self.own.views, "filter_agreement": self.own.agreement, "filter_flip": self.flip}
        made = {"teacher_digest": self.teacher.digest(), **self.inner.identity()}  # which need not go by a teacher
        return {**made, **own}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """The images `ids`, all of them. Arguments and errors as of the method."""
        sample, least = self.inner(ids, labels, seed), self.own.agreement
        shares = agreement(self.teacher, sample, seed, self.own.views, self.flip, self.rows).tolist()
        records = [
            replace(
                record,
                agreement=rounded(share),
                dropped=None
                if share >= least
                else f"the teacher agrees in {share:.3g} of its views, less than {least:g}",
            )
            for record, share in zip(sample.records, shares, strict=True)
        ]
        return replace(sample, records=tuple(records))


@torch.no_grad()
def agreement(teacher: Classifier, sample: Sample, seed: int, views: int, flip: bool, rows: int) -> Tensor:
    """Share [N], float64 on the CPU, of random views of each image in which the teacher gives the label.

    rows: images per call.
    """
    ids = torch.tensor([record.id for record in sample.records])
    found = torch.zeros(len(sample), dtype=torch.float64)
    for view in range(views):
        for cut in torch.split(torch.arange(len(sample)), rows):
            images = sample.images[cut].to(teacher.device).float() / 255
            moved = seen(images, unguided_view(seed, ids[cut], view, images.shape[-1], flip).to(teacher.device))
            found[cut] += (teacher.logits(moved).argmax(1).cpu() == sample.labels[cut]).double()
    return found / views


def unguided_view(seed: int, ids: Tensor, number: int, side: int, flip: bool) -> Tensor:
    """View `number`, float32 [B, V], of the images `ids`, int64 [B], of `side` pixels, as of `views.draw`."""
    kind = ViewConfig.of(guide_shift=max(round(side * SHIFT), 1), guide_crop=SHARE, guide_flip=flip)
    return draw(kind, seed, ids, FIRST_VIEW + number, side, side)
