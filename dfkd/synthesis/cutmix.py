"""Latent CutMix: a box of a partner's latents, of the same class, pasted into an image's (arXiv:1905.04899 for images).

    lam ~ Beta(a, a);  sides H sqrt(1 - lam), W sqrt(1 - lam);  centre uniform, box rounded and clipped to the latents;
    z[box] <- z_partner[box];  the label is kept, both being of one class

    paper    after the step, a = alpha                                                       arXiv 2504.00870
    code     before the step's UNet call, a = u of a u ~ Beta(alpha, alpha)                  as its program has it
    mixup    z <- (lam z + (1 - lam) z_partner) / sqrt(lam^2 + (1 - lam)^2) in the place of the paste. The noises of two
             images are independent, and the root keeps their variance: z stays at the step's noise level
    repair   so many times, the box is noised back to the level before the step and denoised with the step again; around
             it the latents stay (RePaint, arXiv 2201.09865)

The remaining denoising steps repair the seams too. An image's partner, box and lam are functions of the run's seed, its
own id, the event's number and the ids of its class in the group; the order of the group does not change them. A paste
after the step is part of its kernel (dfkd_kernels.guided_step).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dfkd.config import CutMixConfig
from dfkd.errors import UsageError
from dfkd.synthesis.sampler import Repair
from dfkd.synthesis.schedule import StepTable
from dfkd_kernels.guided_step import Mix, inside, paste
from dfkd_kernels.philox import philox_bits, philox_uniform

# Streams of random numbers: the sampler's noise takes those below 1 << 30. From there on two for each event are
# CutMix's, and from 3 << 29 on two for each turn of a repair; those from 1 << 31 on belong to others.
FIRST_STREAM = 1 << 30
REPAIR_STREAM = 3 << 29
TURNS = 1 << 16  # the most turns of a repair, whose streams an event keeps free
LEAST = 1e-3  # of a Beta distribution's parameter; below, lam is 0 or 1 in double precision as well


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


def plan(
    seed: int,
    ids: Tensor,
    labels: Tensor,
    event: int,
    alpha: float,
    height: int,
    width: int,
    form: str = "paper",
) -> CutMixPlan:
    """Partners and boxes of CutMix event number `event` for one whole group.

    Args:
        seed: the run's seed, 0 <= seed < 2^64.
        ids: int64 [n], image ids, all different.
        labels: int64 [n].
        event: 0 for the first CutMix of a trajectory, below 2^12.
        alpha: parameter of the Beta distribution, > 0.
        height, width: size of the latents.
        form: "paper": lam ~ Beta(alpha, alpha); "code": lam ~ Beta(u, u), u ~ Beta(alpha, alpha).

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
    u = philox_uniform(seed, ids, stream, (4,), torch.float64)
    # Imported here and not above: SciPy takes long to load, and most runs have no CutMix.
    from scipy.special import betaincinv

    a = betaincinv(alpha, alpha, u[:, 3].numpy()).clip(LEAST) if form == "code" else alpha
    lam = torch.from_numpy(betaincinv(a, a, u[:, 0].numpy()))
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


class LatentCutMix:
    """The events of a pack of images, as the functions that the sampler's loop takes: mix, enter, leave, repair.

    plans: by step, partners as positions in the pack. size: height and width of the latents. seed, ids: of the noise of
    repairs, ids int64 [B] on the device.
    """

    def __init__(
        self,
        config: CutMixConfig,
        plans: Mapping[int, CutMixPlan],
        table: StepTable,
        size: tuple[int, int],
        seed: int,
        ids: Tensor,
    ) -> None:
        self.config, self.plans, device = config, plans, ids.device
        self._mixes = {i: (plan.partner.to(device), plan.box.to(device)) for i, plan in plans.items()}
        pairs = {i: _shares(plan) for i, plan in plans.items()}
        self._shares = {i: (own.to(device), other.to(device)) for i, (own, other) in pairs.items()}
        self._repairs = {i: self._repair(i, table, size, seed, ids) for i in plans} if config.repair else {}

    def mix(self, i: int) -> Mix | None:
        """Partners and boxes that step i's kernel pastes."""
        return self._mixes.get(i) if (self.config.form, self.config.mix) == ("paper", "box") else None

    def enter(self, i: int, z: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latents and the clean estimate before them, as the UNet call of step i gets them."""
        if self.config.form != "code" or i not in self.plans:
            return z, before
        return self._mixed(i, z), None if before is None else self._mixed(i, before)

    def leave(self, i: int, z: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and clean estimate behind step i, where its kernel does not mix them."""
        if (self.config.form, self.config.mix) != ("paper", "mixup") or i not in self.plans:
            return z, z0
        return self._mixed(i, z), self._mixed(i, z0)

    def repair(self, i: int) -> Repair | None:
        """What of step i is taken again."""
        return self._repairs.get(i)

    def _mixed(self, i: int, z: Tensor) -> Tensor:
        if self.config.mix == "box":
            return paste(z, *self._mixes[i])
        own, other = (share.to(z.dtype) for share in self._shares[i])
        return own * z + other * z[self._mixes[i][0]]

    def _repair(self, i: int, table: StepTable, size: tuple[int, int], seed: int, ids: Tensor) -> Repair:
        partner, box = self.plans[i].partner, self.plans[i].box
        whole = box.new_tensor([0, 0, *size]).expand_as(box)
        mixed = (partner != torch.arange(len(partner)))[:, None, None, None]  # others have nothing to repair
        cells = mixed & inside(box if self.config.mix == "box" else whole, *size)
        ratio = float(table.alpha[i] / table.alpha[i + 1])
        spread = float((table.sigma[i] ** 2 - (ratio * table.sigma[i + 1]) ** 2).clamp_min(0).sqrt())
        first = REPAIR_STREAM + 2 * TURNS * i
        streams = range(first, first + 2 * self.config.repair, 2)
        noisy = float(table.step_noise[i]) != 0
        noises = [((seed, ids, stream), (seed, ids, stream + 1) if noisy else None) for stream in streams]
        return Repair(cells.to(ids.device), ratio, spread, noises, partial(self._mixed_before, i))

    def _mixed_before(self, i: int, before: Tensor) -> Tensor:
        """The clean estimate before step i, of what its repair denoises."""
        return before if self.config.form == "code" else self._mixed(i, before)


def _shares(plan: CutMixPlan) -> tuple[Tensor, Tensor]:
    """Factors of an image and of its partner in mixup, float64 [n, 1, 1, 1] each; 1 and 0 where it has no partner."""
    lam = torch.where(plan.partner == torch.arange(len(plan.partner)), 1.0, plan.lam)
    root = (lam**2 + (1 - lam) ** 2).sqrt()
    return (lam / root)[:, None, None, None], ((1 - lam) / root)[:, None, None, None]


def _boxes(side: Tensor, centre_y: Tensor, centre_x: Tensor, height: int, width: int) -> Tensor:
    """int64 [n, 4] from the side ratio and the centre in (0, 1), all [n]: ends clipped, then rounded to whole cells."""
    ends = []
    for centre, size in ((centre_y, height), (centre_x, width)):
        start = centre * size - side * size / 2
        ends.append((start.clamp_min(0).round().long(), (start + side * size).clamp_max(size).round().long()))
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
