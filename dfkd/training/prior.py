"""Training of a diffusion prior on images: a small one from nothing, or one that exists.

OUT is a diffusers pipeline in the end, with dfkd.json, README.md and result.json; on the way it holds checkpoint.pt,
log.jsonl and preview.png, and of a latent prior autoencoder/. Beside dfkd.training.teacher this module alone of the
library reads real images.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkd.config import PriorTrainConfig
from dfkd.data import Form, Images
from dfkd.errors import UsageError
from dfkd.runtime import resolve_device, seed_global
from dfkd.training.autoencoder import HALF, STAGE, VAE, encode, open_autoencoder, train_autoencoder
from dfkd.training.denoising import attention_of
from dfkd.training.folder import finished, read_result, run_folder, write_result
from dfkd.training.loop import Progress, Say, Training, fit
from dfkd.training.losses import Network
from dfkd.training.prior_existing import LORA_WEIGHTS, existing_parts, open_existing, save_lora
from dfkd.training.prior_folder import (
    INDEX,
    PREVIEW,
    RESULTS,
    pipeline_bytes,
    refuse_foreign,
    save_pipeline,
    write_card,
)
from dfkd.training.prior_networks import PATCH, check_sizes, factor_of
from dfkd.training.prior_parts import Parts, labels_of, new_parts
from dfkd.training.prior_samples import check_judge, judged, write_preview
from dfkd.training.state import State
from dfkd.training.step import autocast, check_training
from dfkd.training.world import World
from dfkd_engine.priors.patches import Patches
from dfkd_engine.priors.source import PriorSource

CONTENT = "training_images"  # the field of the identity that is known once the images are read
VALIDATED, ROWS = 256, 64  # images of a validation at most, and of its calls


def train_prior(
    data: str | Mapping[str, Images],
    config: PriorTrainConfig,
    out: Path | str,
    *,
    size: int | None = None,
    prior: str | None = None,
    files: Mapping[str, Any] | None = None,
    judge: Path | str | None = None,
    world: World | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    on_new: Callable[[], object] | None = None,
) -> Path:
    """Train a prior and write it as a diffusers pipeline, whose folder is returned.

    data: a set of images as dfkd.evaluation.open_splits names it, or images by split: "train" and "validation".
    size: side of the images; of a prior that exists, its own where None. prior: a pipeline to go on from; None trains
    from nothing. files: which of its files, by the names of PriorSource. judge: folder of a classifier that reads
    samples at the end.
    world, progress, say and on_new: as of dfkd.training.distill.distill. A run that was stopped goes on where its last
    checkpoint was, with the same result (bit for bit on a CPU); a finished one returns at once.

    Raises UsageError: images that cannot be read, sizes, classes or networks that do not fit, what cannot work on the
    device, an `out` that holds something else, and a run that has diverged; Stopped for SIGTERM and SIGINT, after a
    checkpoint at the end of the step (in the main thread).
    """
    from dfkd.evaluation import described

    out, progress, say = Path(out), progress or (lambda done, total: None), say or (lambda text: None)
    world = world or World(resolve_device(config.train.compute.device))
    check_training(config.train, world)
    refuse_foreign(out, prior, config.autoencoder.source)
    if prior is None and size is None:
        raise UsageError("no size", "a prior that is trained from nothing needs the side of its images", "give it")
    folder, side = None, size or 0
    if prior is not None:
        folder, side = world.from_first(lambda: open_existing(PriorSource(prior, **(files or {})), config, size))
    elif not _latent(config) or config.autoencoder.source is None:
        check_sizes(config.denoiser, side, factor_of(config.denoiser, config.autoencoder))
    named = data if isinstance(data, str) else data["train"].digest[:16]
    identity = {**config.identity(), "data": named, "size": side, "prior": prior, CONTENT: None}
    if folder is not None:
        identity["prior_digests"] = folder.digests()
    last = LORA_WEIGHTS if config.lora_rank else INDEX
    with run_folder(out, RESULTS, config.train.resume, world, on_new):
        if world.from_first(lambda: finished(out, out / last, identity, ignoring=[CONTENT])):
            return out
        learning, validation = open_data(data, side)
        names = learning.class_names
        identity[CONTENT] = learning.digest[:16]
        reader = None if judge is None else check_judge(Path(judge), names)
        labels_of(names)
        if folder is None:
            vae = _autoencoder(config, learning, side, out, identity, world, progress, say)
            parts = new_parts(config, side, names, vae, world.device)
        else:
            parts = existing_parts(folder, config, side, names, world.device)
        learn = sum(p.numel() for p in parts.denoising.parameters() if p.requires_grad)
        say(f"prior: {learn / 1e6:.2f} million parameters that learn, on {described(learning)}, {world.device}")
        state = _fit(parts, learning, validation, config, out, identity, world, progress, say)
        if world.first:
            network: Any = state.result.eval()
            result = {
                "steps": state.step,
                "seconds": round(state.seconds + _stage_seconds(out), 3),
                "images": len(learning.labels),
                "class_names": list(names),
                "validation_loss": state.kept["validation_loss"],
                "judged": None if reader is None else judged(reader, parts, network, names, config.train.seed),
                "parameters": sum(p.numel() for p in parts.denoiser.parameters()),
                "skipped": int(state.skipped),
                "device": str(world.device),
                "processes": world.size,
                "threads": torch.get_num_threads(),
                "out": str(out),
            }
            if config.lora_rank:
                save_lora(out, network.denoiser)
            else:
                save_pipeline(out, parts, network, config.weights)
            result["bytes"] = pipeline_bytes(out)
            write_card(out, {**result, "run": identity}, parts)
            write_result(out, identity, result)
            shutil.rmtree(out / STAGE / VAE, ignore_errors=True)  # it lies in OUT/vae; not before the run is finished
    return out


def open_data(data: str | Mapping[str, Images], size: int) -> tuple[Images, Images]:
    """Images to learn from and to validate on, of the same classes. Raises UsageError."""
    if isinstance(data, str):
        from dfkd.evaluation import open_splits

        data = open_splits(data, size, splits=("train", "validation"), least_classes=1)
    return data["train"], data["validation"]


def _autoencoder(
    config: PriorTrainConfig,
    learning: Images,
    size: int,
    out: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> Any:
    """The frozen VAE of a latent prior, Patches of one of patches, None of one of pixels."""
    if not _latent(config):
        return Patches(PATCH) if config.denoiser.space == "patch" else None
    if config.autoencoder.source is not None:
        return open_autoencoder(config.autoencoder.source, world.device)
    images = learning
    if config.autoencoder.data is not None:
        from dfkd.evaluation import open_splits

        images = open_splits(config.autoencoder.data, size, splits=("train",), least_classes=1)["train"]
    return train_autoencoder(images, learning, config, size, out, identity, world, progress, say)


def _stage_seconds(out: Path) -> float:
    """What the autoencoder took that was trained for this prior, 0 where none was."""
    stage = read_result(out / STAGE) or {"seconds": 0.0}
    return float(stage["seconds"])


def _latent(config: PriorTrainConfig) -> bool:
    return config.denoiser.space == "latent"


def _fit(
    parts: Parts,
    learning: Images,
    validation: Images,
    config: PriorTrainConfig,
    out: Path,
    identity: Mapping[str, Any],
    world: World,
    progress: Progress,
    say: Say,
) -> State:
    """Train the denoiser, and a text encoder that learns with it."""
    under_autocast = autocast(config.train.compute.amp, world.device)

    def example(labels: Tensor) -> tuple[Tensor, ...]:
        z0 = torch.zeros(len(labels), parts.channels, parts.side, parts.side, device=world.device)
        return z0, *parts.conditions.of(labels)

    def loss(network: Network, images: Tensor, labels: Tensor) -> Tensor:
        with under_autocast(), attention_of(world.device, config.train.compute.amp):
            z0 = images if parts.vae is None else encode(parts.vae, images)
            return network(z0, *parts.conditions.draw(labels, config.drop))

    def evaluate(state: State) -> dict[str, float]:
        network: Any = state.result.eval()
        write_preview(out / PREVIEW, parts, network, learning.class_names, config.train.seed)
        count, rows = min(VALIDATED, len(validation.labels)), max(1, min(ROWS, config.train.batch_size // world.size))
        losses = []
        for positions in torch.split(torch.arange(count) * len(validation.labels) // count, rows):
            seed_global(config.train.seed, world.device)  # the same noise at every check; the loop seeds every step
            pixels = validation.read(positions).to(world.device).float() / 127.5 - 1
            with torch.no_grad():
                found = loss(network, pixels, validation.labels[positions].to(world.device))
            losses.append(float(found) * len(positions) / count)
        state.kept = {"validation_loss": sum(losses)}
        return dict(state.kept)

    form = Form(parts.size, HALF, HALF, world.device)
    training = Training(
        parts.denoising,
        learning,
        torch.arange(len(learning.labels)),
        form,
        loss,
        evaluate,
        example=example(torch.zeros(2, dtype=torch.int64, device=world.device)),
    )
    return fit(training, config.train, out, identity, world, progress, say)
