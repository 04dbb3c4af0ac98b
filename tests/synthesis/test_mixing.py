"""Latent CutMix in the sampler's loops: where it is taken, mixup, and the repair of boxes."""

import os
from typing import ClassVar

import pytest
import torch
from scipy.stats import beta, kstest

from dfkd.config import GenerateConfig
from dfkd.errors import UsageError
from dfkd.synthesis import cutmix
from dfkd_kernels.guided_step import inside, paste
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import SIDE, SmallPrior, doubled, pipeline

SEED, STEPS = 11, 4
IDS, LABELS = torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
UNGUIDED = {"guidance_step": 0.0}
MIXED = {"cutmix_every": 2, **UNGUIDED}  # one event in four steps, at step 1: the last has none


def run(monkeypatch, **own):
    """Final latents, those of every UNet call, and the pack, in float64."""
    prior = SmallPrior()
    pipe = doubled(pipeline(prior, **own), monkeypatch)
    pack = pipe.pack(IDS, SEED)
    found = pipe.latents(pack)
    return found, [z[:7] for z in prior.seen], pack


def test_as_in_code_the_paste_comes_before_the_unet_call(monkeypatch):
    _, plain, _ = run(monkeypatch, **UNGUIDED)
    _, mixed, pack = run(monkeypatch, **MIXED, cutmix_as="code")
    plan = pack.plans[1]
    assert torch.equal(mixed[0], plain[0]) and pack.plans.keys() == {1}
    assert torch.equal(mixed[1], paste(plain[1], plan.partner, plan.box)) and not torch.equal(mixed[1], plain[1])


def test_as_in_code_guidance_through_the_unet_comes_first(monkeypatch):
    """Its gradient is that of the images as they were; the step is that of the mixed ones."""
    own = {"gradient": "unet", "guidance_step": 0.1}
    _, plain, _ = run(monkeypatch, **own)
    _, mixed, pack = run(monkeypatch, **own, cutmix_every=2, cutmix_as="code")
    plan = pack.plans[1]
    assert torch.equal(mixed[2], plain[2])  # the gradient of step 1: two calls a step
    assert torch.equal(mixed[3], paste(plain[3], plan.partner, plan.box)) and not torch.equal(mixed[3], plain[3])


def test_as_in_code_lam_has_a_beta_of_its_own():
    """lam ~ Beta(u, u) of a uniform u: its distribution function is the mean of theirs over u."""
    ids = torch.arange(3000)
    found = cutmix.plan(3, ids, torch.zeros_like(ids), 0, 1.0, 8, 8, "code").lam.numpy()
    shapes = (torch.arange(400).double().numpy() + 0.5) / 400
    fit = kstest(found, lambda x: beta.cdf(x[:, None], shapes, shapes).mean(1))
    assert fit.pvalue > 1e-3 and kstest(found, "uniform").pvalue < 1e-6


def test_mixup_keeps_the_noise_and_mixes_what_it_hides(monkeypatch):
    """Behind its step, with factors whose squares sum to 1; an image without a partner stays."""
    _, plain, _ = run(monkeypatch, **UNGUIDED)
    _, mixed, pack = run(monkeypatch, **MIXED, cutmix_mix="mixup")
    plan = pack.plans[1]
    lam = plan.lam[:, None, None, None]
    root = (lam**2 + (1 - lam) ** 2).sqrt()
    expected = (lam * plain[2] + (1 - lam) * plain[2][plan.partner]) / root
    torch.testing.assert_close(mixed[2], expected, rtol=1e-12, atol=1e-12)
    alone = cutmix.CutMixPlan(torch.tensor([0]), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0.3]))
    assert [share.item() for share in cutmix._shares(alone)] == [1, 0]
    own, other = cutmix._shares(plan)
    torch.testing.assert_close(own**2 + other**2, torch.ones_like(own))


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp2m"])
def test_a_repair_is_the_loop_of_repaint(monkeypatch, sampler, form):
    """Written out: inside of the box back by a step and denoised with the surroundings as they were, twice."""
    own = {**MIXED, "sampler": sampler, "cutmix_as": form, "cfg": 1.0}
    _, plain, pack = run(monkeypatch, **own)
    _, seen, repaired = run(monkeypatch, **own, cutmix_repair=2)
    plan, table, pipe = repaired.plans[1], repaired.pipe.table, repaired.pipe
    assert len(seen) == len(plain) + 2 and torch.equal(seen[1], plain[1])
    hole = inside(plan.box, SIDE, SIDE)
    assert 0 < hole.float().mean() < 1
    rows, z = table.coefficients(seen[0]), plain[2]
    ratio = float(table.alpha[1] / table.alpha[2])
    spread = (table.sigma[1] ** 2 - ratio**2 * table.sigma[2] ** 2).sqrt()
    before = rows[0, 0] * seen[0] + rows[0, 1] * pipe.prior.denoise(seen[0], pack.times[0], *pack.conditional)
    before = paste(before, plan.partner, plan.box)  # in either form, inside of the box
    for turn in range(2):
        first = cutmix.REPAIR_STREAM + 2 * (cutmix.TURNS * 1 + turn)
        noise = philox_normal(SEED, IDS, first, tuple(z.shape[1:])).double()
        x = torch.where(hole, ratio * z + spread * noise, seen[1])
        torch.testing.assert_close(seen[2 + turn], x, rtol=1e-9, atol=1e-9)
        m = pipe.prior.denoise(x, pack.times[1], *pack.conditional)
        behind = rows[1, 2] * x + rows[1, 3] * m + rows[1, 4] * before
        behind = behind + rows[1, 5] * philox_normal(SEED, IDS, first + 1, tuple(z.shape[1:])).double()
        z = torch.where(hole, behind, z)
    torch.testing.assert_close(seen[4], z, rtol=1e-9, atol=1e-9)


class FlowPrior(SmallPrior):
    """Rectified flow instead of a variance-preserving schedule."""

    scheduler_config: ClassVar = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    }


@pytest.mark.parametrize("prior, sampler", [(SmallPrior, "ddpm"), (FlowPrior, "euler")])
def test_noise_of_a_repair_brings_the_level_back(prior, sampler):
    """ratio z' + spread n of z' = a' z0 + s' eps has the noise of the level before: a z0 and variance s^2."""
    pipe = pipeline(prior(), sampler=sampler, **MIXED, cutmix_repair=1)
    pack = pipe.pack(IDS, SEED)
    again, table = pack.cutmix.repair(1), pipe.table
    assert again.spread > 0 and pipe.latents(pack).isfinite().all()
    assert again.ratio * float(table.alpha[2]) == pytest.approx(float(table.alpha[1]))
    assert (again.ratio * table.sigma[2]) ** 2 + again.spread**2 == pytest.approx(float(table.sigma[1] ** 2))
    assert pack.cutmix.repair(0) is None


@pytest.mark.parametrize(
    "own", [{"cutmix_mix": "mixup"}, {"cutmix_as": "code"}, {"cutmix_mix": "mixup", "cutmix_as": "code"}]
)
@pytest.mark.parametrize("repair", [0, 1])
def test_an_image_follows_from_its_group_and_not_from_the_call(own, repair):
    """Groups of six in calls of two, six and twelve."""
    settings = {**own, "cutmix_every": 1, "cutmix_repair": repair, "group": 6, "sampler": "ddpm", "bn_stats": "image"}
    samples = [pipeline(**settings, batch=batch)(range(12), seed=SEED) for batch in (2, 6, 12)]
    for sample in samples[1:]:
        # float32: a convolution of two rows rounds otherwise than one of twelve, and guidance carries it on
        assert (sample.images.int() - samples[0].images.int()).abs().max() <= 1
        assert [(r.partner, r.box, r.mixup) for r in sample.records] == [
            (r.partner, r.box, r.mixup) for r in samples[0].records
        ]
    plain = pipeline(group=6, sampler="ddpm", bn_stats="image", batch=12)(range(12), seed=SEED)
    assert not torch.equal(plain.images, samples[0].images)


def test_a_record_has_the_box_or_the_share(monkeypatch):
    box, mixup = (run(monkeypatch, **MIXED, cutmix_mix=mix)[2] for mix in ("box", "mixup"))
    (first, *_), (second, *_) = box.records(torch.ones(7)), mixup.records(torch.ones(7))
    assert first.partner == second.partner in (3, 6)
    assert first.box == tuple(box.plans[1].box[0].tolist()) and first.mixup is None
    assert second.box is None and second.mixup == pytest.approx(float(mixup.plans[1].lam[0]), rel=1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted here")
@pytest.mark.parametrize("own", [{"cutmix_as": "code", "cutmix_repair": 1}, {"cutmix_mix": "mixup", "sampler": "ddpm"}])
def test_trajectories_in_triton_are_those_in_torch(own):
    found, expected = (
        (pipe := pipeline(**own, cutmix_every=2, kernels=kernels)).latents(pipe.pack(IDS, SEED))
        for kernels in ("triton", "torch")
    )
    # float32: 1e-7 a launch, enlarged by the first step's 1/sqrt(abar) of 15, by CFG and by four guided steps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [{"cutmix_repair": 1}, {"cutmix_mix": "mixup"}])
def test_what_no_event_would_use_is_refused(own):
    with pytest.raises((ValueError, UsageError), match="needs Latent CutMix"):
        GenerateConfig.of(**own)
