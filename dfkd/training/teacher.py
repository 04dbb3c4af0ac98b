"""Supervised training of a classifier on real images, to be a teacher.

OUT/model.safetensors, config.json and result.json are what it leaves. The last network is kept; it is tested once, at
the end. Of the library this module, dfkd.training.prior and dfkd.evaluation alone read real images.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd import teachers
from dfkd.config import RESIZES, TeacherTrainConfig
from dfkd.data import Form, Images, some_names
from dfkd.errors import UsageError
from dfkd.resizing import check_resize
from dfkd.runtime import resolve_device, seed_global
from dfkd.teachers import Classifier
from dfkd.training.folder import WEIGHTS, finished, run_folder, write_result
from dfkd.training.loop import Progress, Say, Training, check_steps, fit, order_of
from dfkd.training.losses import Network, wide
from dfkd.training.state import State
from dfkd.training.step import AMP_DTYPES, autocast, check_training
from dfkd.training.world import World

STATISTICS = 10_000  # images that mean and standard deviation are taken from, at most
CONTENT = "training_images"  # the field of the identity that is known once the images are read
ROWS = 500  # images of a call that judges
SAMPLE = 16  # images of each split that are decoded before the first step
SPLITS = ("train", "validation", "test")


def train_teacher(
    data: str | Mapping[str, Images],
    config: TeacherTrainConfig,
    out: Path | str,
    *,
    architecture: str,
    input_size: int | None = None,
    resize: str = RESIZES[0],
    world: World | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    on_new: Callable[[], object] | None = None,
) -> Classifier:
    """Train a new network and return it as it is after the last step, in evaluation mode.

    data: a set of images as dfkd.evaluation.open_images names it ("digits-on-photos", "imagefolder:PATH", ...), or
    images by split: "train", "validation" and "test".
    architecture: a name that dfkd.teachers.build knows. input_size: side of its images; None is its own. resize: how it
    will be shown larger ones, "antialias" or "published" (dfkd.resizing).
    world, progress, say and on_new: as of dfkd.training.distill.distill. OUT/result.json has the accuracies. A run that
    was stopped goes on where its last checkpoint was, with the same result (bit for bit on a CPU); a finished one
    returns at once, without reading an image.

    Raises UsageError for an unknown architecture, images that cannot be read, a network that answers otherwise than
    with logits or cannot be trained, what cannot work on the device, an `out` of other settings or in use, and a run
    that has diverged; Stopped for SIGTERM and SIGINT, after a checkpoint at the end of the step (in the main thread).
    """
    from dfkd.evaluation import described

    out, progress, say = Path(out), progress or (lambda done, total: None), say or (lambda text: None)
    world = world or World(resolve_device(config.train.compute.device))
    teachers.check(architecture)
    check_training(config.train, world)
    check_resize(resize)
    identity = identity_of(data, config, architecture, input_size, resize)
    with run_folder(out, (WEIGHTS, "config.json"), config.train.resume, world, on_new):
        if world.from_first(lambda: finished(out, out / WEIGHTS, identity, ignoring=[CONTENT])):
            return Classifier.from_pretrained(out).to(world.device)
        learning, validation, testing = _splits(data, input_size or teachers.input_size(architecture))
        identity[CONTENT] = learning.digest[:16]
        classifier = _untrained(learning, config, architecture, world).replace(resize=resize)
        say(f"{architecture} on {len(learning.labels)} images, {world.device}")
        for split, images in zip(SPLITS, (learning, validation, testing), strict=True):
            say(f"{split}: {described(images)}")

        def loss(network: Network, images: Tensor, labels: Tensor) -> Tensor:
            with under_autocast():
                logits = network(images)
            return F.cross_entropy(wide(logits), labels, label_smoothing=config.label_smoothing)

        order = order_of(config.train, len(learning.labels), world)
        # Not more than it learned from since the check before: a short run would spend its time on validation.
        most = max(check_steps(config.train, order) * order.batch_size, ROWS)

        def evaluate(state: State) -> dict[str, float]:
            now = classifier.replace(module=state.result)
            return {"validation_accuracy": accuracy(now, validation, None if state.step == order.steps else most)}

        amp = config.train.compute.amp
        under_autocast = autocast(amp, world.device)
        form = Form(classifier.input_size, classifier.mean, classifier.std, world.device, AMP_DTYPES[amp])
        training = Training(classifier.module, learning, torch.arange(len(learning.labels)), form, loss, evaluate)
        state = fit(training, config.train, out, identity, world, progress, say)
        classifier = classifier.replace(module=state.result.eval())
        if world.first:
            # Saved before it is tested: nothing that a test meets can cost the network.
            classifier.save_pretrained(out, data=identity["data"])
            result = {
                "accuracy": accuracy(classifier, testing),
                "validation_accuracy": accuracy(classifier, validation),
                "test_images": len(testing.labels),
                "test_source": described(testing),
                "seconds": round(state.seconds, 3),
                "steps": state.step,
                "skipped": int(state.skipped),
                "device": str(world.device),
                "processes": world.size,
                "threads": torch.get_num_threads(),
                "class_names": list(classifier.class_names),
                "out": str(out),
            }
            classifier.save_pretrained(out, data=identity["data"], accuracy=result["accuracy"])
            write_result(out, identity, result)
    return classifier.replace(source=str(out))


def identity_of(
    data: str | Mapping[str, Images],
    config: TeacherTrainConfig,
    architecture: str,
    input_size: int | None,
    resize: str = RESIZES[0],
) -> dict[str, Any]:
    """Everything that the teacher depends on; images that are named go in by name here, and by content once read."""
    named = data if isinstance(data, str) else data["train"].digest[:16]
    own = {"data": named, "architecture": architecture, "input_size": input_size, CONTENT: None}
    own |= {"resize": resize} if resize != RESIZES[0] else {}
    return {**config.identity(), **own}


def _splits(data: str | Mapping[str, Images], size: int) -> tuple[Images, Images, Images]:
    """Images to learn from, to validate and to test on, of the same classes in one order; a few of each are decoded.

    Raises UsageError for any of them that cannot be, so that none is missed once the network is trained.
    """
    if isinstance(data, str):
        from dfkd.evaluation import open_splits

        data = open_splits(data, size)
    for split in SPLITS:
        what, todo = f"the images' split '{split}'", "give images for train, validation and test"
        if split not in data:
            raise UsageError(f"{what} is missing", f"there are {', '.join(data)}", todo)
        images, names = data[split], data["train"].class_names
        if not (count := len(images.labels)):
            raise UsageError(f"{what} is empty", todo=todo)
        if images.class_names != names:
            why = f"it has {some_names(images.class_names)}, train has {some_names(names)}"
            raise UsageError(f"{what} has other classes", why, "give the same classes in the same order")
        images.read(evenly(count, SAMPLE))
    return data["train"], data["validation"], data["test"]


@torch.no_grad()
def accuracy(classifier: Classifier, images: Images, most: int | None = None) -> float:
    """Share, in 0..1, of the images that the classifier puts in their class; leaves it in evaluation mode.

    most: images, spread evenly over all of them; None for all.
    """
    classifier.eval()
    right, total = 0, len(images.labels)
    count = min(most or total, total)
    for positions in torch.split(torch.arange(count) * total // count, ROWS):
        first = classifier(images.read(positions)).argmax(1).cpu()
        right += int((first == images.labels[positions]).sum())
    return right / count


def _untrained(learning: Images, config: TeacherTrainConfig, architecture: str, world: World) -> Classifier:
    """The network on the device, with weights that follow from the seed; torch's generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        seed_global(config.train.seed, torch.device("cpu"))
        network = teachers.build(architecture, len(learning.class_names))
    network = world.synchronised(network, config.train.compute.sync_bn).to(world.device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = statistics(learning)
    side = learning.read(torch.tensor([0])).shape[-1]
    return Classifier(network, learning.class_names, mean, std, side, architecture).tried(training=True)


def statistics(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel, of images in 0..1; of STATISTICS evenly spaced ones where more exist."""
    count = len(images.labels)
    chosen = evenly(count, STATISTICS)
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in torch.split(chosen, ROWS):
        pixels = images.read(part)
        for channel in range(3):
            counts[channel] += torch.bincount(pixels[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt().clamp_min(1e-3)
    return _rounded(mean), _rounded(std)


def evenly(count: int, most: int) -> Tensor:
    """At most `most` positions int64 spread evenly over `count`, ascending."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most


def _rounded(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue
