"""A synthesis from its settings alone: what dfkd-generate does, and dfkd-run at that stage."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dfkd.config import GenerateCommand, GenerateConfig, plain
from dfkd.data import MANIFEST, export_imagefolder, open_folder, read_manifest, require_space
from dfkd.errors import UsageError
from dfkd.extension import resolve
from dfkd.files import make_writable, replace_text, save_settings
from dfkd.logs import check_logs
from dfkd.runtime import choose_kernels, own_rank, resolve_device
from dfkd.synthesis.checks import require_losses
from dfkd.synthesis.each import EachTeacher
from dfkd.synthesis.losses import losses_of
from dfkd.synthesis.methods import ADVERSARIAL, METHODS, check_several, make_method, needs_prior, unread
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.plan import make_plan, predict, seconds_of, table
from dfkd.synthesis.prompts import prompt_of
from dfkd.synthesis.run import Run, Written, open_run, run_on_record
from dfkd.synthesis.schedule import find_sampler
from dfkd.synthesis.synthesizer import Synthesizer, innermost
from dfkd.synthesis.trials import images_of
from dfkd.synthesis.watch import Progress
from dfkd.teachers import Classifier, load_teacher
from dfkd_engine.priors.guidance_decoder import check_decoder
from dfkd_engine.priors.prior import Prior, check_source

COMMAND = "dfkd-generate"
RESULT = "result.json"
IMAGE_FOLDER = "imagefolder"

Say = Callable[[str], object]


@dataclass(frozen=True)
class InTurn:
    """How the images of a run are made that learns from them in between.

    untrained: what its student is before, None where no image is made against one. identity: what the images follow
    from beside the settings, in JSON's types. images: of a phase, which ends a shard. write: makes them all.
    """

    untrained: Classifier | None
    identity: Mapping[str, Any]
    images: int
    write: Callable[[Run], Written]


def check(asked: GenerateCommand, student_comes: bool = False) -> None:
    """Raise UsageError or EngineError for what is known to be wrong before a teacher is there and a network is loaded.

    A prior on the hub is not fetched for that. student_comes: the student is not there yet.
    """
    config, student = asked.generate, None if student_comes else asked.student_checkpoint
    check_logs(asked.logging)
    choose_kernels(config.compute.kernels, resolve_device(config.compute.device, own_rank()))
    if student is not None and not student.exists():
        raise UsageError(f"--student-checkpoint {student}", "there is no such file or folder", "correct the path")
    if asked.teacher.clients:
        check_several(config)
    if not needs_prior(config):
        return
    find_sampler(config.sampling.sampler)
    prompt_of(config.sampling.prompt or "", "any")
    if config.guidance.step > 0:
        require_losses(config.guidance, losses_of(config.guidance))
    check_source(asked.prior.source, **asked.prior.files())
    if config.guidance.decoder is not None:
        check_decoder(config.guidance.decoder)


def group_of(config: GenerateConfig) -> int:
    """Images that are made together, as far as the settings say it: of a method, or of losses, of one's own they do
    not. Raises UsageError for an unknown method."""
    factory, settings = resolve(config.method, METHODS, "method")
    if factory in ADVERSARIAL:
        return int(settings.get("group") or config.batching.group)
    if factory is not GuidedPipeline:
        return 1
    guidance, snapshots = config.guidance, 1 + config.sampling.keep_intermediates
    statistics = guidance.step and guidance.bn_stats == "group" and (guidance.bn_weight or guidance.noise_edit_steps)
    return (config.batching.group if config.cutmix.every or statistics else 1) * snapshots


def pipeline_of(asked: GenerateCommand, say: Say = lambda text: None, student: Classifier | None = None) -> Synthesizer:
    """The synthesizer that the settings name, its networks loaded and on their device; the first process says what the
    teacher is and what it is fed.

    student: instead of the one that the settings name. Raises UsageError or EngineError: a network is absent or
    damaged, or does not fit the others.
    """
    rank, config = own_rank(), asked.generate
    device = resolve_device(config.compute.device, rank)
    teacher, prior = load_teacher(asked.teacher).freeze(device), None
    if rank.first:
        say(f"teacher: {teacher.described()}")
    if student is None and asked.student_checkpoint is not None:
        student = Classifier.from_pretrained(asked.student_checkpoint).freeze(device)
    if needs_prior(config):
        if not (rank.first and sys.stderr.isatty()):
            quieten_libraries()
        own = asked.prior
        prior = Prior.from_pretrained(own.source, dtype=config.compute.dtype, device=device, **own.files())
    return make_method(config, prior, teacher, student)


def quieten_libraries() -> None:
    """Take bars and hints from the libraries that load the networks; their errors still come through."""
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    disable_progress_bars()


def run(
    asked: GenerateCommand, say: Say, progress: Progress | None = None, turns: InTurn | None = None
) -> dict[str, Any] | None:
    """Make what is missing, write OUT/settings.json and OUT/result.json; returns what result.json holds.

    turns: how, where a student learns in between. Of the processes of torchrun each makes its own shards; the first
    alone speaks, and has a result, None in the others. Raises UsageError as `generate`, and for images that are not
    finite.
    """
    rank = own_rank()
    check_logs(asked.logging)
    make_writable(asked.out)
    untrained = turns.untrained if turns else None
    synthesizer = pipeline_of(asked, say, untrained)
    if untrained is not None:
        synthesizer.update(None)  # type: ignore[attr-defined]  # it takes a student: one that comes later
    names, size = synthesizer.class_names, synthesizer.image_size
    also, part = (turns.identity, turns.images) if turns else ({}, 0)
    with open_run(synthesizer, asked.out, asked.count, asked.seed, asked.generate, say, rank, also, part) as work:
        if rank.first:
            save_settings(asked, asked.out, COMMAND)
            for line in getattr(synthesizer, "describe", tuple)():
                say(line)
            if idle := unread(synthesizer, asked.generate):
                say(f"method {synthesizer.name} does not go by --" + ", --".join(idle).replace("_", "-"))
            if asked.format == "imagefolder":
                stored = work.images(work.missing) + asked.count
                require_space(asked.out, stored, size, asked.generate.shards.image_format)
        written = turns.write(work) if turns else work.write(progress, asked.logging)
    if not rank.first:
        return None
    if asked.format == "imagefolder":
        export_imagefolder(asked.out, asked.out / IMAGE_FOLDER)
    pool = open_folder(asked.out)
    counts = torch.bincount(pool.labels, minlength=len(names)).tolist()
    if pool.dropped:
        say(f"filter: {len(pool.dropped)} of {asked.count} images are left out of training, and stay in their shards")
        gone = [name for name in wanted_of(synthesizer) if not counts[names.index(name)]]
        if gone and asked.count >= len(names):
            say(f"WARNING: no image is left of {', '.join(gone)}: a student will not learn them from these images")
    result = {
        "out": asked.out,
        "images": asked.count,
        "dropped": len(pool.dropped),
        "image_size": size,
        "images_written": written.images,
        "shards_written": written.shards,
        "shards_before": written.before,
        "seconds": round(written.seconds, 3),
        "images_per_second": round(written.images / written.seconds, 3) if written.images else None,
        "processes": rank.count,
        "plan": work.plan.to_json() if work.plan else None,
        "run": dict(work.folder.run),
        "backends": getattr(synthesizer, "backends", {}),
        "kernels": getattr(synthesizer, "kernels", None),
        "class_names": names,
        "class_counts": counts,
    }
    replace_text(asked.out / RESULT, json.dumps(plain(result), indent=1, sort_keys=True) + "\n")
    return result


def wanted_of(synthesizer: Synthesizer) -> list[str]:
    """Names of the classes that a synthesizer makes images of: all of them, unless it says which."""
    names = synthesizer.class_names
    return [names[label] for label in getattr(synthesizer, "classes", range(len(names)))]


def plan(asked: GenerateCommand, say: Say) -> dict[str, Any]:
    """What a run would take: images per call, memory, seconds. Nothing is written.

    Raises UsageError as `pipeline_of`, and for a method whose network calls are not known.
    """
    synthesizer, missing = pipeline_of(asked, say), asked.count
    pipe = innermost(synthesizer)
    if not isinstance(pipe, GuidedPipeline):
        flag = "--teaching each" if isinstance(pipe, EachTeacher) else f"--method {pipe.name}"
        raise UsageError(f"--plan-only with {flag}", "its network calls are not known", "leave it out")
    found = make_plan(pipe, asked.generate)
    if (asked.out / MANIFEST).exists():
        missing -= sum(int(shard["count"]) for shard in read_manifest(asked.out)[1])
    pipe.call_size = found.call_size
    known = run_on_record(asked.out)
    pipe.use_engines(known.get("engines"))
    if "class_words" in set(pipe.prepares) - known.keys():
        what, why = f"--plan-only with --class-words {asked.generate.sampling.class_words}", "its seconds are not known"
        raise UsageError(what, f"{why} before the words are learned", "plan without it; then start the run")
    made = getattr(synthesizer, "made", 1)
    timings = predict(pipe, found, asked.generate.shards.image_format, made)
    lengths = 0 if set(pipe.prepares) <= known.keys() else asked.generate.guidance.step_trials
    trials = lengths * images_of(pipe) * found.snapshots  # each is a trajectory, which several images share else
    taking = missing + -(-trials // made)
    for line in (*pipe.describe(), *table(found, timings, taking)):
        say(line)
    if trials:
        say(f"of these images {taking - missing} stand for those of --step-trials, which come before")
    seconds = seconds_of(found, timings, taking)
    forecast = {
        "images": missing,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "predicted_seconds": round(seconds, 3),
        "predicted_images_per_second": round(missing / seconds, 3) if missing else None,
    }
    return {"out": asked.out, "images": asked.count, "plan": {**found.to_json(), **forecast}}
