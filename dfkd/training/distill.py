"""Distillation: a student learns a frozen teacher's answers on synthetic images.

OUT/last, OUT/best     the student as model.safetensors and config.json
OUT/result.json        what came of it, once it is finished
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd import teachers
from dfkd.config import DistillConfig
from dfkd.data import Batch, Form, Images, Order, damage_text, match_network, open_data, read_all
from dfkd.errors import UsageError
from dfkd.extension import described
from dfkd.runtime import KernelChoice, choose_kernels, derived_seed, resolve_device, seed_global
from dfkd.teachers import Classifier
from dfkd.teachers.committee import Committee
from dfkd.training.folder import WEIGHTS, finished, run_folder, write_result
from dfkd.training.loop import Progress, Say, Training, check_steps, fit, never, order_of
from dfkd.training.losses import (
    CrossEntropy,
    DistillLoss,
    KullbackLeibler,
    Objective,
    OwnTeachers,
    kl_at_temperature,
    own_losses,
)
from dfkd.training.mixing import mix
from dfkd.training.msarc import Msarc
from dfkd.training.state import State
from dfkd.training.step import AMP_DTYPES, autocast, check_training, compiled
from dfkd.training.trial import without_gradient
from dfkd.training.world import World

ROWS = 500  # images of a call that judges

Data = Images | Path | str | Sequence[Path | str]


def distill(
    data: Data,
    teacher: Classifier,
    config: DistillConfig,
    out: Path | str,
    *,
    student: nn.Module | Classifier | None = None,
    losses: Sequence[DistillLoss] = (),
    world: World | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    on_new: Callable[[], object] | None = None,
) -> Classifier:
    """Train a student on synthetic images and return it as it is after the last step, in evaluation mode.

    data: what `generate` returned, or one or several folders of images, whose classes are the teacher's.
    teacher: is frozen in place (`Classifier.freeze`), on the device of the run.
    student: a network to train in place instead of config.student, alone or in a Classifier of the teacher's classes
    (such as `warm_start` reads), and fed what the teacher is; None builds config.student anew. Its weights before
    training belong to the run: whoever continues a stopped run, or asks for a finished one, gives a network that starts
    from the same.
    losses: losses beside those that the settings name.
    world: of dfkd.training.world.join where the run has several processes, each of which calls this with the same
    arguments; the first alone writes. Its device is then the run's.
    progress(images shown, images in all) is called before the first step and after each, say(text) with what a user
    should know, on_new() by the first process once it holds `out`, unless a run was begun there: the commands write
    settings.json so.

    OUT/last is this student, OUT/best the one that agreed best with the teacher on the held-out images, both without an
    architecture's name where `student` is a bare module; OUT/result.json has the numbers. A run that was stopped goes
    on where its last checkpoint was, with the same result (bit for bit on a CPU); a finished one returns at once.

    Raises UsageError for classes that disagree, a network that answers otherwise than with logits or cannot be trained,
    what cannot work on the device or with other settings, an `out` of other settings or in use, and a run that has
    diverged; Stopped for SIGTERM and SIGINT, after a checkpoint at the end of the step (in the main thread).
    """
    out, progress, say = Path(out), progress or (lambda done, total: None), say or (lambda text: None)
    world = world or World(resolve_device(config.train.compute.device))
    kernels = check(config, world)
    images = match_network(_opened(data, config, say), teacher.class_names, teacher.input_size)
    _check_pair(images, teacher)
    teacher, untrained = (
        teacher.tried(),
        untrained_student(student, teacher, config, images.class_names).tried(training=True),
    )
    own = (*own_losses(config), *losses)
    identity = identity_of(images, teacher, config, own, untrained if student is not None else None)
    teacher, pupil = teacher.freeze(world.device), _pupil(untrained, config, world)
    bound = _losses(config, own, kernels, teacher, pupil)
    with run_folder(out, ("last", "best"), config.train.resume, world, on_new):
        if world.from_first(lambda: finished(out, out / "last" / WEIGHTS, identity)):
            pupil.module.load_state_dict(safetensors.torch.load_file(out / "last" / WEIGHTS))
            return pupil.eval().replace(source=str(out / "last"))
        say(f"kernels: {kernels.name} ({kernels.why})")
        say(f"losses: {', '.join(loss.describe() for loss in bound)}")
        rows, held = split(images.ids, config.held_out)
        judge = HeldOut(images, held if world.first else held[:0], teacher, pupil, config, out)
        training = _training(images, rows, teacher, pupil, bound, config, judge)
        order = order_of(config.train, len(rows), world)
        _require_checks(config, order)
        state = fit(training, config.train, out, identity, world, progress, say)
        if state.step < order.steps:
            say(f"ended after step {state.step} of {order.steps}: {config.plateau} checks without a better agreement")
        pupil = pupil.replace(module=state.result.eval())
        if world.first:
            result = {
                **judge.finish(state),
                "steps": state.step,
                "steps_asked": order.steps,
                "ended_by": "plateau" if state.step < order.steps else "length",
                "skipped": int(state.skipped),
                "images": state.step * order.batch_size,
                "left_out": [bad.id for bad in getattr(images, "left_out", ())],
                "seconds": round(state.seconds, 3),
                "device": str(world.device),
                "processes": world.size,
                "threads": torch.get_num_threads(),
                "kernels": vars(kernels),
                "class_names": list(images.class_names),
                "out": str(out),
            }
            write_result(out, identity, result)
    return pupil.replace(source=str(out / "last"))


def check(
    config: DistillConfig, world: World, teacher: Classifier | None = None, images: int | None = None
) -> KernelChoice:
    """What computes the losses. Raises UsageError for what cannot work, as far as that is known before data is read.

    teacher: where it is known what the student will answer and be fed, it is built and tried as `distill` would;
    images: how many there will be.
    """
    check_training(config.train, world)
    own_losses(config)
    if teacher is not None and images is not None:
        student = untrained_student(None, teacher, config, teacher.class_names).tried(training=True)
        order = order_of(config.train, len(split(torch.arange(images), config.held_out)[0]), world)
        _require_checks(config, order)
        without_gradient(student.module, form_of(teacher, student.device), order.batch_size // world.size)
    return choose_kernels(config.kernels, world.device)


def warm_start(folder: Path, config: DistillConfig) -> Classifier:
    """The student of a folder, to be trained further: OUT/last of a distillation of the same architecture.

    Raises UsageError: no classifier is there, or it is of another architecture.
    """
    found = Classifier.from_pretrained(folder)
    if found.architecture != config.student:
        what = f"--init {folder} is {found.architecture or 'a network without a name'}, the student {config.student}"
        raise UsageError(what, "weights are taken up by a network of the same architecture", "change one of the two")
    return found


def identity_of(
    images: Images,
    teacher: Classifier,
    config: DistillConfig,
    own: Sequence[DistillLoss],
    student: Classifier | None = None,
) -> dict[str, Any]:
    """Everything that the student depends on: settings, and by content teacher, images and losses of one's own.

    student: the untrained one, where it is not built from the settings: its class and weights stand for config.student.
    """
    given = {} if student is None else {"student": f"{type(student.module).__name__} {student.digest()[:16]}"}
    return {
        **config.identity(),
        **given,
        "loss": [described(loss) for loss in own],
        "teacher": f"{teacher.architecture} {teacher.digest()[:16]}",
        "data": images.digest[:16],
    }


def split(ids: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Positions int64 for training and held out, ascending; the ids with the smallest hashes are held out.

    An image's place follows from its id and not from the run's seed, so that runs compare on the same images. At least
    one image is held out unless `part` is 0, and at least one is left for training.
    """
    count = min(len(ids) - 1, max(1, round(part * len(ids)))) if part else 0
    ranks = sorted(range(len(ids)), key=[derived_seed(0, "held-out", i) for i in ids.tolist()].__getitem__)
    train, held = (torch.tensor(sorted(half), dtype=torch.int64) for half in (ranks[count:], ranks[:count]))
    return train, held


class HeldOut:
    """Judges a student on synthetic images that it does not learn from, without real data, and saves it.

    positions: of the held-out images, int64 [n]; without any nothing is measured, and the best student is the last.
    config: its temperature, and its plateau.
    """

    def __init__(
        self,
        images: Images,
        positions: Tensor,
        teacher: Classifier,
        pupil: Classifier,
        config: DistillConfig,
        out: Path,
    ) -> None:
        self._pupil, self._temperature, self._out = pupil, config.temperature, out
        self._plateau = config.plateau
        self._images = read_all(images, positions, teacher.input_size, teacher.resize) if len(positions) else None
        labels = images.labels[positions] if by_own_teachers(teacher, config) else None
        self._wanted = None if self._images is None else logits_of(teacher, self._images, labels)

    def __call__(self, state: State) -> dict[str, float]:
        """Agreement and KL loss; the student becomes OUT/best where none was better. Leaves it in evaluation mode."""
        if self._images is None or self._wanted is None:
            return {}
        judged = self._pupil.replace(module=state.result.eval())
        last = score(logits_of(judged, self._images), self._wanted, self._temperature)
        state.kept["last"] = last
        if last[0] > state.kept.get("highest_agreement", -1.0):
            state.kept |= {"highest_agreement": last[0], "checks_since": 0}
        else:
            state.kept["checks_since"] += 1
        if last > tuple(state.kept.get("best", (-1.0, 0.0))):  # below any that can occur
            state.kept |= {"best": last, "best_step": state.step}
            judged.save_pretrained(self._out / "best", step=state.step, agreement=last[0])
        return {"agreement": last[0], "held_out_loss": -last[1]}

    def ended(self, state: State) -> bool:
        """Whether as many checks as the plateau is long came after that of the highest agreement."""
        return self._plateau is not None and int(state.kept.get("checks_since", 0)) >= self._plateau

    def finish(self, state: State) -> dict[str, Any]:
        """Save the last student; its agreement and that of the best one, None without held-out images."""
        last = self._pupil.replace(module=state.result.eval())
        last.save_pretrained(self._out / "last", step=state.step)
        if self._images is None:
            last.save_pretrained(self._out / "best", step=state.step)
            return {"agreement": None, "best_agreement": None, "best_step": state.step}
        kept = state.kept
        return {"agreement": kept["last"][0], "best_agreement": kept["best"][0], "best_step": kept["best_step"]}


def by_own_teachers(teacher: Classifier, config: DistillConfig) -> bool:
    """Whether an image is learned from those of several teachers that know its class."""
    return isinstance(teacher, Committee) and config.taught_by == "own"


@torch.no_grad()
def logits_of(classifier: Classifier, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits float32 [N, C] of images uint8 [N, 3, H, W], on the device of the network, which is in eval mode.

    labels: int64 [N], where they decide which of several teachers answer.
    """
    if labels is None:
        return torch.cat([classifier(part).float() for part in torch.split(images, ROWS)])
    pairs = zip(torch.split(images, ROWS), torch.split(labels, ROWS), strict=True)
    return torch.cat([classifier.answers(part, own) for part, own in pairs])


def score(student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, float]:
    """(agreement of the argmax in 0..1, minus the KL loss): compared in that order, more is better."""
    agreement = (student.argmax(1) == teacher.argmax(1)).float().mean()
    return float(agreement), -float(kl_at_temperature(student, teacher, temperature))


def form_of(teacher: Classifier, device: torch.device, dtype: torch.dtype = torch.float32) -> Form:
    """The form in which the teacher is shown images, and so the student."""
    return Form(teacher.input_size, teacher.mean, teacher.std, device, dtype, teacher.resize)


def _opened(data: Data, config: DistillConfig, say: Say) -> Images:
    images = open_data(data, config.on_bad_sample) if isinstance(data, str | Path | Sequence) else data
    if left_out := getattr(images, "left_out", ()):
        say(f"left out: {len(left_out)} of {len(left_out) + len(images.ids)} images: {damage_text(left_out)}")
    return images


def untrained_student(
    student: nn.Module | Classifier | None, teacher: Classifier, config: DistillConfig, class_names: Sequence[str]
) -> Classifier:
    """The student before training, fed what the teacher is; one that is built has weights that follow from the seed.

    torch's generators are left alone. Raises UsageError for a Classifier of other classes.
    """
    if isinstance(student, nn.Module):
        return teacher.replace(module=student, architecture="", source="")
    if student is not None:
        if student.class_names != tuple(class_names):
            why = f"it has {len(student.class_names)}: {', '.join(student.class_names[:10])}"
            todo = "give one of the teacher's classes, in its order"
            raise UsageError("the student's classes are not those of the images", why, todo)
        return teacher.replace(module=student.module, architecture=student.architecture, source="")
    with torch.random.fork_rng(devices=[]):
        seed_global(config.train.seed, torch.device("cpu"))
        network = teachers.build(config.student, len(class_names))
    return teacher.replace(module=network, architecture=config.student, source="")


def _check_pair(images: Images, teacher: Classifier) -> None:
    """Raise UsageError where the classes disagree, or there is too little data."""
    if teacher.class_names != images.class_names:
        theirs, ours = teacher.class_names, images.class_names
        why = f"it has {len(theirs)}, the images have {len(ours)}"
        if len(theirs) == len(ours):
            label = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
            why = f"label {label} is {theirs[label]!r} to the teacher and {ours[label]!r} in the images"
        todo = "use the teacher that the images were made for"
        raise UsageError("teacher and images disagree about the classes", why, todo)
    if len(images.ids) < 2:
        raise UsageError(
            f"the data has {len(images.ids)} images", "training and held-out images need one each at least"
        )


def _require_checks(config: DistillConfig, order: Order) -> None:
    """Raise UsageError for a plateau that is longer than the checks after a run's first."""
    checks = -(-order.steps // check_steps(config.train, order))
    if config.plateau is not None and config.plateau >= checks:
        what = f"--plateau {config.plateau} cannot act: the run has {checks} check{'s' * (checks > 1)}"
        raise UsageError(what, f"the first of its {order.steps} steps' checks sets the agreement to surpass",
                         "lower it, or check more often with --checkpoint-every")  # fmt: skip


def _pupil(untrained: Classifier, config: DistillConfig, world: World) -> Classifier:
    """The student on the device, as it is trained."""
    twice = config.msarc.weight and config.msarc.maps != "cam"  # no SyncBatchNorm is differentiated twice
    network = world.synchronised(untrained.module, "off" if twice else config.train.compute.sync_bn)
    network = network.to(world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return untrained.replace(module=network)


def _losses(
    config: DistillConfig, own: Sequence[DistillLoss], kernels: KernelChoice, teacher: Classifier, pupil: Classifier
) -> list[DistillLoss]:
    """Every loss of the settings, made for the two networks."""
    losses: list[DistillLoss] = [KullbackLeibler(temperature=config.temperature, kernels=kernels.name)]
    if isinstance(teacher, Committee) and by_own_teachers(teacher, config):
        losses = [OwnTeachers(temperature=config.temperature, committee=teacher)]
    losses += [CrossEntropy(config.ce_weight)] if config.ce_weight else []
    losses += [Msarc.of(config.msarc)] if config.msarc.weight else []
    bound = [loss.bind(teacher.module, pupil.module, teacher.input_size) for loss in (*losses, *own)]
    compute = config.train.compute
    for loss in bound:
        if (loss.teacher_layers or loss.student_layers) and (compute.compile != "off" or compute.cuda_graph):
            flag = "--cuda-graph" if compute.cuda_graph else f"--compile {compute.compile}"
            raise UsageError(
                f"{loss.describe()} with {flag}", "it looks at layers inside of the networks", "leave one out"
            )
    return bound


def _training(
    images: Images,
    rows: Tensor,
    teacher: Classifier,
    pupil: Classifier,
    losses: Sequence[DistillLoss],
    config: DistillConfig,
    judge: HeldOut,
) -> Training:
    compute, device = config.train.compute, pupil.device
    # What autocast would round in front of the first layer may come rounded; what is blended is blended before.
    dtype = torch.float32 if config.mix in ("mixup", "both") else AMP_DTYPES[compute.amp]
    form = form_of(teacher, device, dtype)
    call_teacher = compiled(teacher.module, compute.compile)
    objective = Objective(teacher.module, pupil.module, losses, autocast(compute.amp, device), call_teacher)

    def mixed(batch: Batch, total: int, rows: slice) -> Tensor:
        assert batch.random is not None  # the steps of a run have their own
        return mix(batch.images, config.mix, config.mix_alpha, batch.random, total, rows)

    ended = never if config.plateau is None else judge.ended
    return Training(pupil.module, images, rows, form, objective, judge, mixed, ended=ended)
