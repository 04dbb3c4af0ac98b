"""A pack of images, sampled at once, and the functions of the sampler's loop for it.

A pack is whole groups where images of a group interact, and as many of them as a call holds.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfkd.data import Record
from dfkd.synthesis import cutmix
from dfkd.synthesis.batching import calling, cuts
from dfkd.synthesis.finite import Faults
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.sampler import ToLatent, unit_rms
from dfkd.synthesis.synthesizer import rounded
from dfkd_kernels.guided_step import Noise, clean_estimate
from dfkd_kernels.philox import philox_normal

if TYPE_CHECKING:
    from dfkd.synthesis.pipeline import Callback, GuidedPipeline

INITIAL_NOISE = 0  # Philox stream of z_T; step i draws from stream 1 + i


class Pack:
    """The images of one pass of the sampler, and the functions that it takes: denoise, guide, noise, after.

    ids, labels: int64 [B], given on the CPU and held on the device; whole groups in turn where images interact.
    losses: filled by `guide`, {step: {name: [B]}}, taken before the last guidance step of each denoising step.
    plans: Latent CutMix by step, partners as positions in the pack. cutmix: these, as the sampler takes them.
    faults: what was first not finite. named: the ids by which an error names the images.
    keep, kept: steps whose clean estimates [B, C, h, w] are wanted, and these, by step. losses_then: `losses` then.
    """

    def __init__(
        self,
        pipe: "GuidedPipeline",
        ids: Tensor,
        labels: Tensor,
        prompts: Sequence[str],
        seed: int,
        callback: "Callback | None" = None,
    ) -> None:
        self.pipe, self.callback, self.batch, device = pipe, callback, pipe.call_size, pipe.device
        self.seed, self.prompts, self.ids, self.labels = seed, prompts, ids.to(device), labels.to(device)
        sampling, table = pipe.config.sampling, pipe.table
        self.conditional = pipe.prior.conditions(prompts, pipe.image_size, pipe.cfg)
        self.cfg_rows = [pipe.cfg_rows(i) for i in range(len(table))]
        guided = max(self.cfg_rows) == 2
        self.unconditional = pipe.prior.unconditional(sampling.negative_prompt, pipe.image_size) if guided else ()
        self.times = table.timesteps.to(device, torch.float32)
        self.noisy = [noise != 0 for noise in table.step_noise.tolist()]
        self.losses: dict[int, dict[str, Tensor]] = {}
        self.gradients = 0  # taken so far, by which views are drawn
        self.streams = 0  # where those of this trajectory begin, of those of an image
        self.stepped: Callable[[], object] = lambda: None  # called after every step of any kind
        self.keep: Collection[int] = ()
        self.kept: dict[int, Tensor] = {}
        self.losses_then: dict[int, dict[int, dict[str, Tensor]]] = {}
        self.faults, self.named = Faults(len(ids), device), self.ids
        self.plans = self._cutmix_plans(ids, labels)
        self.cutmix = cutmix.LatentCutMix(pipe.config.cutmix, self.plans, table, pipe.latent_size, seed, self.ids)

    def start(self) -> Tensor:
        """z_T: the images' own noise, float32 [B, C, h, w]."""
        shape = (self.pipe.prior.latent_channels, *self.pipe.latent_size)
        return self.pipe.table.init_scale * philox_normal(self.seed, self.ids, INITIAL_NOISE, shape)

    @torch.no_grad()
    def restart(self, images: Tensor, first: int) -> Tensor:
        """z at step `first` of another trajectory, around what images [B, 3, H, W] in 0..1 are as latents.

        z = alpha encode(x) + sigma n, float32 [B, C, h, w]; its noise, and that of its steps, is new.
        """
        with calling("encode"):
            z0 = torch.cat([self.pipe.prior.encode(images[cut]).float() for cut in cuts(len(images), self.batch)])
        self.faults.see(z0, "latents", "re-encoding")
        self.streams += 1 + len(self.cfg_rows)
        noise = philox_normal(self.seed, self.ids, self.streams + INITIAL_NOISE, tuple(z0.shape[1:]))
        return float(self.pipe.table.alpha[first]) * z0 + float(self.pipe.table.sigma[first]) * noise

    def denoise(self, z: Tensor, i: int, images: Tensor | None = None) -> Tensor:
        """The UNet's output [K, B, C, h, w] at step i, as `sampler.Denoise`: K = 2 where classifier-free guidance acts.

        Both rows of an image are in one call.
        """
        conditional = [tensor if images is None else tensor[images] for tensor in self.conditional]
        outputs = []
        with calling("unet"):
            for cut in cuts(len(z), self.batch):
                rows, given = z[cut], [tensor[cut] for tensor in conditional]
                if self.cfg_rows[i] == 2:
                    free = [tensor.expand_as(own) for tensor, own in zip(self.unconditional, given, strict=True)]
                    rows, given = torch.cat([rows] * 2), [torch.cat(pair) for pair in zip(free, given, strict=True)]
                output = self.pipe.denoise(rows, self.times[i], *given)
                outputs.append(torch.unflatten(output, 0, (self.cfg_rows[i], -1)))
        predicted = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        self.faults.see(predicted.transpose(0, 1), "unet", self._step(i), images)
        return predicted

    def gradient(
        self, guidance: Guidance, point: Tensor, to_latent: ToLatent | None = None, where: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Guidance gradient in `point` [B, ...] and losses {name: [B]}: a group at a time where its images interact.

        where: the step, for people.
        """
        self.faults.see(point, "latents", where)
        view = self.pipe.view(self.seed, self.ids, self.gradients)
        self.gradients += 1
        size = self.pipe.group if "group" in guidance.needs else len(point)
        found = []
        with calling("gradient"):
            for cut in cuts(len(point), size):
                way = to_latent and partial(_shifted, to_latent, cut.start)
                seen = None if view is None else view[cut]
                found.append(guidance.gradient(point[cut], self.labels[cut], self.batch, way, seen))
        gradients, records = zip(*found, strict=True)
        gradient = torch.cat(gradients)
        losses = {name: torch.cat([record[name] for record in records]) for name in records[0]}
        for kind, values in (*losses.items(), ("gradient", gradient)):
            self.faults.see(values, kind, where)
        return gradient, losses

    def guide(self, point: Tensor, i: int, to_latent: ToLatent | None = None) -> Tensor:
        """The guidance step rho g at step i, as `sampler.Guide`."""
        assert self.pipe.guidance is not None
        config = self.pipe.config.guidance
        gradient, self.losses[i] = self.gradient(self.pipe.guidance, point, to_latent, self._step(i))
        return self.pipe.lengths[i] * (unit_rms(gradient) if config.norm == "rms" else gradient)

    def noise(self, i: int) -> Noise | None:
        return (self.seed, self.ids, self.streams + 1 + i) if self.noisy[i] else None

    def after(self, i: int, z: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
        self.stepped()
        if self.callback is not None:
            timestep = float(self.pipe.table.timesteps[i])
            found = self.callback(self.pipe, i, timestep, {"latents": z, "clean": z0}) or {}
            z, z0 = found.get("latents", z), found.get("clean", z0)
        self.faults.see(z, "latents", self._step(i))
        if i in self.keep and i not in self.kept:  # where the image is encoded again, step i comes again
            self.kept[i], self.losses_then[i] = z0, dict(self.losses)
        return z, z0

    def noise_gradient(self, rows: Tensor, guidance: Guidance) -> Callable[[Tensor], Tensor]:
        """Gradient of the losses in z_T, along the path that the settings name; rows as of `sampler.sample`."""
        through = self.pipe.config.guidance.gradient == "unet"

        def to_latent(z: Tensor, images: Tensor) -> Tensor:
            with torch.set_grad_enabled(through and torch.is_grad_enabled()):
                model = self.denoise(z, 0, images)
            return clean_estimate(z, model, rows[0])

        return lambda z: self.stepping(guidance, z, "an edit of the noise", to_latent)

    def stepping(self, guidance: Guidance, point: Tensor, where: str, to_latent: ToLatent | None = None) -> Tensor:
        """`gradient` of a step that is no denoising step."""
        found, _ = self.gradient(guidance, point, to_latent, where)
        self.stepped()
        return found

    def _step(self, i: int) -> str:
        return f"step {i + 1} of {len(self.cfg_rows)}"

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images in 0..1, float32 [B, 3, H, W]."""
        with calling("decode"):
            images = torch.cat([self.pipe.decode(z[cut]).float() for cut in cuts(len(z), self.batch)])
        self.faults.see(images, "decode", "the end")
        return images

    def records(self, probability: Tensor, step: int | None = None) -> list[Record]:
        """What is known of each image. probability: the teacher's for the label, [B]. step: of which they are the clean
        estimates, whose losses are that step's, without a curve; None: they are finished."""
        losses = self.losses if step is None else self.losses_then[step]
        guided = [losses[i] for i in sorted(losses)]
        names = list(guided[0]) if guided else []
        curves = {name: torch.stack([values[name] for values in guided], 1).tolist() for name in names}
        mixed = [self.plans[i] for i in sorted(self.plans) if step is None or i <= step]
        last, mixup = mixed[-1] if mixed else None, self.pipe.config.cutmix.mix == "mixup"
        ids, labels, found = self.ids.tolist(), self.labels.tolist(), []
        for n, sure in enumerate(probability.tolist()):
            curve = {name: [rounded(value) for value in values[n]] for name, values in curves.items()}
            found.append(
                Record(
                    id=ids[n],
                    label=labels[n],
                    class_name=self.pipe.class_names[labels[n]],
                    seed=self.seed,
                    prompt=self.prompts[n],
                    partner=ids[int(last.partner[n])] if last else None,
                    box=tuple(last.box[n].tolist()) if last and not mixup else None,
                    mixup=rounded(float(last.lam[n])) if last and mixup else None,
                    losses={name: values[-1] for name, values in curve.items()},
                    loss_curve=curve if step is None else {},
                    step=step,
                    teacher_probability=rounded(sure),
                )
            )
        return found

    def _cutmix_plans(self, ids: Tensor, labels: Tensor) -> dict[int, cutmix.CutMixPlan]:
        """The Latent CutMix after each step that one is due after, of every group by itself; none follows the last."""
        config, group = self.pipe.config.cutmix, self.pipe.group
        steps = range(len(self.pipe.table) - 1)

        def planned(step: int, cut: slice) -> cutmix.CutMixPlan:
            size = self.pipe.latent_size
            return cutmix.plan(self.seed, ids[cut], labels[cut], step, config.alpha, *size, config.form)

        due = [step for step in steps if config.every and (step + 1) % config.every == 0]
        return {step: cutmix.packed([planned(step, cut) for cut in cuts(len(ids), group)]) for step in due}


def _shifted(to_latent: ToLatent, start: int, z: Tensor, images: Tensor) -> Tensor:
    """`to_latent` for images that are counted from `start` on."""
    return to_latent(z, images + start)
