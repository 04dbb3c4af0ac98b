"""Latent CutMix: a box of a partner's latents, of the same class, pasted into an image's (arXiv:1905.04899 for images).

    lam ~ Beta(a, a);  sides H sqrt(1 - lam), W sqrt(1 - lam);  centre uniform, box clipped to the latents;
    z[box] <- z_partner[box];  the label is kept, both being of one class

The remaining denoising steps repair the seams. An image's partner, box and lam are functions of the run's seed, its own
id, the event's number and the ids of its class in the group; the order of the group does not change them. The paste
itself is part of the step's kernel (dfkd_kernels.guided_step).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd_kernels.philox import philox_bits, philox_uniform

# Streams of random numbers from here on belong to CutMix, two for each event; the sampler's noise takes those below.
FIRST_STREAM = 1 << 30


@dataclass(frozen=True)
class CutMixPlan:
    """One event for a group of n images.

    partner: int64 [n], index within the group of the image pasted from; an image's own index where its class has one.
    box: int64 [n, 4], rows y0, x0, y1, x1 with 0 <= y0 <= y1 <= H and 0 <= x0 <= x1 <= W, ends exclusive; may be empty.
    lam: float64 [n] in [0, 1], the draw from Beta(a, a): the share kept before the box is rounded and clipped.
    """

    partner: Tensor
    box: Tensor
    lam: Tensor


def plan(seed: int, ids: Tensor, labels: Tensor, event: int, alpha: float, height: int, width: int) -> CutMixPlan:
    """Partners and boxes of CutMix event number `event` for one whole group.

    Args:
        seed: the run's seed, 0 <= seed < 2^64.
        ids: int64 [n], image ids, all different.
        labels: int64 [n].
        event: 0 for the first CutMix of a trajectory, below 2^29.
        alpha: parameter of the Beta distribution, > 0.
        height, width: size of the latents.

    Raises:
        UsageError: alpha is not positive.
        ValueError: ids and labels are not two vectors of one length, or an id comes twice.
    """
    if not alpha > 0:
        raise UsageError(f"CutMix alpha {alpha}", "the Beta distribution needs a number above 0")
    ids, labels = ids.cpu(), labels.cpu()
    if ids.shape != labels.shape or ids.dim() != 1 or len(set(ids.tolist())) != len(ids):
        raise ValueError(
            f"ids {tuple(ids.shape)} and labels {tuple(labels.shape)}: want vectors of one length, ids unique"
        )
    stream = FIRST_STREAM + 2 * event
    u = philox_uniform(seed, ids, stream, (3,), torch.float64)
    # Imported here and not above: SciPy takes long to load, and most runs have no CutMix.
    from scipy.special import betaincinv

    lam = torch.from_numpy(betaincinv(alpha, alpha, u[:, 0].numpy()))
    return CutMixPlan(
        partner=_partners(ids, labels, philox_bits(seed, ids, stream + 1, (1,))[:, 0]),
        box=_boxes(torch.sqrt(1 - lam), u[:, 1], u[:, 2], height, width),
        lam=lam,
    )


def packed(plans: Sequence[CutMixPlan]) -> CutMixPlan:
    """The plans of several groups as one of all their images in turn."""
    partners, start = [], 0
    for plan in plans:
        partners.append(plan.partner + start)
        start += len(plan.partner)
    return CutMixPlan(torch.cat(partners), torch.cat([p.box for p in plans]), torch.cat([p.lam for p in plans]))


def _boxes(side: Tensor, centre_y: Tensor, centre_x: Tensor, height: int, width: int) -> Tensor:
    """int64 [n, 4] from the side ratio and the centre in (0, 1), all [n]; whole cells, clipped to the latents."""
    ends = []
    for centre, size in ((centre_y, height), (centre_x, width)):
        length = (side * size).long()
        start = (centre * size).long() - length // 2
        ends.append((start.clamp(0, size), (start + length).clamp(0, size)))
    (y0, y1), (x0, x1) = ends
    return torch.stack([y0, x0, y1, x1], dim=1)


def _partners(ids: Tensor, labels: Tensor, bits: Tensor) -> Tensor:
    """int64 [n]: for each image the index of another one of its class, drawn evenly by the image's own bits."""
    partner = torch.arange(len(ids))
    for label in set(labels.tolist()):
        members = (labels == label).nonzero()[:, 0]
        members = members[ids[members].argsort()]  # by id, so that the group's order plays no part
        if (others := len(members) - 1) > 0:
            # A step of 1 to `others` places around the sorted class never comes back to the image itself.
            step = 1 + bits[members] % others
            partner[members] = members[(torch.arange(len(members)) + step) % len(members)]
    return partner
