"""The published method, written down once more from its paper and its program, against the presets' own settings.

`published` is DiffDFKD's loop (arXiv 2504.00870) with FedCADO's edit of the noise (arXiv 2311.08870) before it: plain
torch and a scheduler of diffusers, one image at a time, float64. Two of the differences in docs/published.md are
ours here too: the last step is one as all others, and an image draws its own noise.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor, nn

from dfkd.config import GenerateConfig
from dfkd.synthesis.cutmix import plan
from dfkd.synthesis.intermediates import kept_steps
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.teachers import Classifier
from dfkd_kernels.philox import philox_normal
from tests.synthesis.small_networks import CHANNELS, CLASS_NAMES, SCHEDULER, SIDE, SmallPrior, classifier, doubled

SEED, STEPS, IMAGES = 11, 10, 6
IDS = torch.arange(IMAGES)
SMALL = {
    "steps": STEPS,
    "size": 0,
    "group": IMAGES,
    "batch": 4,
    "device": "cpu",
    "backend": "eager",
    "kernels": "torch",
}
SHAPE = (CHANNELS, SIDE, SIDE)
Mix = tuple[Sequence[int], Sequence[tuple[int, int, int, int]]]


def bn_distance(teacher: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's logits, and the sum over BatchNorm layers of ||var - rvar|| + ||mean - rmean|| of their inputs."""
    found: list[Tensor] = []

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), unbiased=False)
        found.append(torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2))  # type: ignore[operator]

    layers = [layer for layer in teacher.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    mean, std = (torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1) for values in (teacher.mean, teacher.std))
    logits = teacher.module((x - mean) / std)
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(found).sum()


def published(
    prior: SmallPrior, teacher: Classifier, student: Classifier | None, scheduler: Any, config: GenerateConfig,
    labels: Sequence[int], words: Sequence[str], mixes: dict[int, Mix], keep: Iterable[int], draw: Any,
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """Images [N, 3, H, W], and clean latents behind the steps in `keep`. draw(image, stream): noise [1, C, h, w]."""
    own, (nothing,) = config.guidance, prior.unconditional()
    (prompts,) = prior.conditions(words)

    def predict(z: Tensor, t: Tensor, n: int) -> Tensor:
        free, prompted = prior.denoise(z, t, nothing), prior.denoise(z, t, prompts[n : n + 1])
        return free + config.sampling.cfg * (prompted - free)

    def guided(z: Tensor, t: Tensor, n: int, bn: float, oh: float, adv: float) -> Tensor:
        z = z.detach().requires_grad_()
        clean = scheduler.step(predict(z, t, n), t, z).pred_original_sample
        x = prior.decode(clean).clamp(0, 1)
        logits, loss_bn = bn_distance(teacher, x)
        loss = bn * loss_bn + oh * F.cross_entropy(logits, torch.tensor([labels[n]]))
        if adv:
            answer, target = bn_distance(student, x)[0], logits.detach()
            mask = (answer.argmax(1) == target.argmax(1)).double()
            kl = F.kl_div(answer.log_softmax(1), target.softmax(1), reduction="none").sum(1)
            loss = loss - adv * (kl * mask).mean()
        (gradient,) = torch.autograd.grad(loss, z)
        return (z - gradient).detach()

    zs, kept = [draw(n, 0) * scheduler.init_noise_sigma for n in range(len(labels))], {}
    for _ in range(own.noise_edit_steps):
        zs = [guided(z, scheduler.timesteps[0], n, 0.1, 0, 0) for n, z in enumerate(zs)]
    for i, t in enumerate(scheduler.timesteps):
        zs = [guided(z, t, n, own.bn_weight, own.cls_weight, own.adv_weight) for n, z in enumerate(zs)]
        if i in mixes:
            before = [z.clone() for z in zs]
            for n, (partner, (y0, x0, y1, x1)) in enumerate(zip(*mixes[i], strict=True)):
                zs[n][:, :, y0:y1, x0:x1] = before[partner][:, :, y0:y1, x0:x1]
        behind = []
        for n, z in enumerate(zs):
            scheduling_ddpm.randn_tensor = lambda *_, n=n, i=i, **__: draw(n, 1 + i)
            behind.append(scheduler.step(predict(z, t, n), t, z))
        zs = [step.prev_sample for step in behind]
        if i in keep:
            kept[i] = torch.cat([step.pred_original_sample for step in behind])
    return torch.cat([prior.decode(z) for z in zs]), kept


CASES = {  # preset, and what differs from it here
    "cifar10": {"cutmix_every": 2},
    "cifar10-label": {},
    "domainnet-quickdraw": {"cutmix_every": 3},
    "domainnet-sketch": {"cutmix_every": 2},
    "fedcado": {},
}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("name", CASES)
def test_a_preset_does_what_is_published(name: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over whole trajectories: update rule, losses, edits of the noise, CutMix and intermediates, by either sampler."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))  # put back in the end
    config = GenerateConfig.preset(name).replace(**SMALL, **CASES[name], sampler=sampler)
    student = classifier(5) if config.guidance.adv_weight else None
    pipe = doubled(GuidedPipeline(SmallPrior(), classifier(), config, student), monkeypatch)
    if pipe.student is not None:
        pipe.student.module.double()
    pack = pipe.pack(IDS, SEED)
    pack.keep = kept_steps(STEPS, config.sampling.keep_intermediates)
    ours = pipe.prior.decode(pipe.latents(pack))

    labels = pack.labels.tolist()
    kind = DDPMScheduler if sampler == "ddpm" else DDIMScheduler
    scheduler = kind(**SCHEDULER, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    mixes: dict[int, Mix] = {}
    for i in range(STEPS - 1) if config.cutmix.every else ():
        if (i + 1) % config.cutmix.every == 0:
            event = plan(SEED, IDS, pack.labels, i, 1.0, SIDE, SIDE, "code")
            mixes[i] = event.partner.tolist(), [tuple(box) for box in event.box.tolist()]
    words = [config.sampling.prompt.format(label=CLASS_NAMES[label]) for label in labels]

    def draw(n: int, stream: int) -> Tensor:
        return philox_normal(SEED, IDS[n : n + 1], stream, SHAPE).double()

    prior, teacher = pipe.prior, pipe.teacher
    theirs, kept = published(prior, teacher, pipe.student, scheduler, config, labels, words, mixes, pack.keep, draw)
    # Float64 on both sides; diffusers holds the levels of its first and last step in float32, 1e-7 of each.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert kept.keys() == pack.kept.keys() and len(kept) == config.sampling.keep_intermediates
    for i, clean in kept.items():
        torch.testing.assert_close(pack.kept[i], clean, rtol=0, atol=1e-6)

    plain = GuidedPipeline(SmallPrior(), classifier(), config.replace(guidance_step=0.0, noise_edit_steps=0))
    free = doubled(plain, monkeypatch)
    unguided = free.prior.decode(free.latents(free.pack(IDS, SEED)))
    assert (unguided - ours).abs().max() > 0.01, "guidance that does nothing would agree with anything"
