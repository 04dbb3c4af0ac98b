"""A synthesis run: which images are missing, group by group, into shards.

The unit of work is a group (images that interact), the unit of commit a shard of whole groups. A shard's bytes follow
from the run's settings alone, so a run that was killed is finished by computing the shards that are not there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkd.data.shards import Record, ShardFolder
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.memory import ShortMemory, calling, release
from dfkd.synthesis.microbatch import in_microbatches
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.sampler import SampledGroup, SamplerSettings, sample_group
from dfkd.synthesis.schedule import StepTable
from dfkd.teachers.classifier import Classifier
from dfkd_engine.networks import Prior

LOSS_DIGITS = 5  # digits of a recorded loss: the record is for reading, not for computing on


@dataclass(frozen=True)
class Rows:
    """Images per call of the UNet, of the decoder at the end, and of the guidance gradient."""

    unet: int
    decode: int
    gradient: int


@dataclass(frozen=True)
class Synthesis:
    """All that the pixels depend on, but for the image id.

    classes      label indices to synthesise, in turn
    group        images that are sampled together; image i belongs to group i // group
    latent_size  (h, w)
    kernels      of kernels.guided_step.GUIDED_STEPS; results differ by rounding
    """

    prior: Prior
    teacher: Classifier
    guidance: Guidance | None
    table: StepTable
    settings: SamplerSettings
    seed: int
    classes: Sequence[int]
    group: int
    prompt: str
    negative_prompt: str
    latent_size: tuple[int, int]
    device: torch.device
    kernels: str = "torch"

    def sample(
        self, group: int, micro: int, gradient_micro: int | None = None, decode_micro: int | None = None
    ) -> tuple[Tensor, list[Record]]:
        """Sample group number `group` whole: images uint8 [group, H, W, 3] on the CPU and their records.

        micro, gradient_micro, decode_micro: as of `sample_group`, and what it raises.
        """
        ids = torch.arange(group * self.group, (group + 1) * self.group)
        labels = labels_of(ids, self.classes)
        names = [self.teacher.class_names[label] for label in labels.tolist()]
        prompts = [prompt_of(self.prompt, name) for name in names]
        sampled = sample_group(
            self.prior,
            self.guidance,
            self.table,
            self.settings,
            self.seed,
            ids.to(self.device),
            labels.to(self.device),
            self.prior.encode_prompts(prompts),
            self.prior.encode_prompts([self.negative_prompt]),
            self.latent_size,
            micro,
            self.kernels,
            gradient_micro,
            decode_micro,
        )
        pixels = (sampled.images.clamp(0, 1) * 255).round().to(torch.uint8)
        with calling("gradient" if self.guidance else "decode"):  # the teacher has as many rows as where it guides
            few = min(micro, gradient_micro or micro, decode_micro or micro)
            sure = self._teacher_probability(pixels, labels.to(self.device), few).cpu()
        records = _records(sampled, ids, labels, names, prompts, self.seed, sure)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu(), records

    @torch.no_grad()
    def _teacher_probability(self, pixels: Tensor, labels: Tensor, micro: int) -> Tensor:
        """The teacher's probability [G] of the label, on the pixels as they are stored."""

        def of(rows: Tensor) -> Tensor:
            return self.teacher.logits(pixels[rows].float() / 255).float().softmax(1)

        return in_microbatches(of, len(pixels), micro, pixels.device).gather(1, labels[:, None])[:, 0]


def _records(
    sampled: SampledGroup,
    ids: Tensor,
    labels: Tensor,
    names: Sequence[str],
    prompts: Sequence[str],
    seed: int,
    sure: Tensor,
) -> list[Record]:
    curves = {name: values.cpu().double() for name, values in sampled.curves.items()}
    plan = sampled.plan
    partners = plan.partner.cpu() if plan else None
    boxes = plan.box.cpu().tolist() if plan else None
    records = []
    for i in range(len(ids)):
        curve = {name: [float(f"{v:.{LOSS_DIGITS}g}") for v in values[i].tolist()] for name, values in curves.items()}
        records.append(
            Record(
                id=int(ids[i]),
                label=int(labels[i]),
                class_name=names[i],
                seed=seed,
                prompt=prompts[i],
                partner=int(ids[partners[i]]) if partners is not None else None,
                box=tuple(boxes[i]) if boxes is not None else None,
                losses={name: values[-1] for name, values in curve.items()},
                loss_curve=curve,
                teacher_probability=float(f"{float(sure[i]):.{LOSS_DIGITS}g}"),
            )
        )
    return records


@dataclass(frozen=True)
class RunResult:
    """What a run did: images and shards written now, seconds of sampling, shards that were there already, and the rows
    that the last group was sampled with.
    """

    images: int
    shards: int
    shards_before: int
    seconds: float
    rows: Rows


def synthesise(
    folder: ShardFolder,
    synthesis: Synthesis,
    rows: Rows,
    advance: Callable[[int], object],
    smaller: Callable[[str, Rows, str], Rows] | None = None,
) -> RunResult:
    """Write the shards that `folder` lacks; `advance(n)` is called after every n images.

    Images beyond the folder's count, sampled because their group needs them, are dropped.

    smaller: (network, rows, the device's words) -> the rows to go on with where a call of `network` found too little
        memory. The group is sampled again with them, and those that follow. None: ShortMemory ends the run.
    """
    missing = folder.missing()
    started, written = time.perf_counter(), 0
    for index in missing:
        shard_started = time.perf_counter()
        ids = folder.layout.ids(index)
        images: list[Tensor] = []
        records: list[Record] = []
        for group in range(ids.start // synthesis.group, -(-ids.stop // synthesis.group)):
            (pixels, described), rows = _sampled(synthesis, group, rows, smaller)
            keep = sum(record.id < ids.stop for record in described)
            images.append(pixels[:keep])
            records += described[:keep]
            advance(keep)
        folder.write(index, torch.cat(images).numpy(), records, time.perf_counter() - shard_started)
        written += len(records)
    seconds = time.perf_counter() - started
    return RunResult(written, len(missing), folder.layout.shard_count() - len(missing), seconds, rows)


def _sampled(
    synthesis: Synthesis, group: int, rows: Rows, smaller: Callable[[str, Rows, str], Rows] | None
) -> tuple[tuple[Tensor, list[Record]], Rows]:
    """A group, and the rows that it was sampled with in the end."""
    while True:
        try:
            return synthesis.sample(group, rows.unet, rows.gradient, rows.decode), rows
        except ShortMemory as error:
            if smaller is None:
                raise
            short = error.network, error.why
        # here the error is gone, and with it the frames that hold the failed call's tensors
        release(synthesis.device)
        rows = smaller(short[0], rows, short[1])
