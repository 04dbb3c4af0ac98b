"""dfkd-generate: a frozen teacher, and a frozen diffusion prior, -> labelled synthetic images in shards."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command, save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import GenerateCommand, plain
from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_text

if TYPE_CHECKING:
    from dfkd.synthesis.synthesizer import Synthesizer

COMMAND = "dfkd-generate"
RESULT = "result.json"
IMAGE_FOLDER = "imagefolder"


def pipeline_of(asked: GenerateCommand, backend: str | None = None) -> "Synthesizer":
    """The synthesizer that the settings name, its networks loaded and on their device.

    backend: instead of the settings'. Raises UsageError or EngineError: a network is absent or damaged, or does not fit
    the others.
    """
    from dfkd.runtime import own_rank, resolve_device
    from dfkd.synthesis.methods import make_method, needs_prior
    from dfkd.teachers import Classifier, load_teacher
    from dfkd_engine.prior import Prior

    rank = own_rank()
    if not (rank.first and sys.stderr.isatty()):
        quieten_libraries()
    config = asked.generate if backend is None else asked.generate.replace(backend=backend)
    device = resolve_device(config.compute.device, rank)
    teacher = load_teacher(asked.teacher).freeze(device)
    student = None
    if asked.student_checkpoint is not None:
        student = Classifier.from_pretrained(asked.student_checkpoint).freeze(device)
    prior = None
    if needs_prior(config):
        prior = Prior.from_pretrained(asked.prior, dtype=config.compute.dtype, device=device)
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


def run(asked: GenerateCommand) -> dict[str, Any] | None:
    """Make what is missing, write OUT/settings.json and OUT/result.json; with --plan-only the plan alone.

    Of the processes of torchrun each does this for its own shards; the first alone speaks, and has a result.
    """
    import torch

    from dfkd.data import export_imagefolder, open_folder, require_space
    from dfkd.runtime import own_rank
    from dfkd.synthesis.run import open_run

    rank = own_rank()
    if asked.plan_only:
        return plan(asked) if rank.first else None
    make_writable(asked.out)
    synthesizer = pipeline_of(asked)
    names = synthesizer.class_names
    with open_run(synthesizer, asked.out, asked.count, asked.seed, asked.generate, say, rank) as work:
        if rank.first:
            for line in getattr(synthesizer, "describe", tuple)():
                say(line)
            save_settings(asked, asked.out, COMMAND)
            if asked.format == "imagefolder":
                stored = work.images(work.missing) + asked.count
                require_space(asked.out, stored, synthesizer.image_size, asked.generate.shards.image_format)
        with progress("synthesis", "img", shown=rank.first) as draw:
            written = work.write(draw)
    if not rank.first:
        return None
    if asked.format == "imagefolder":
        export_imagefolder(asked.out, asked.out / IMAGE_FOLDER)
    result = {
        "out": asked.out,
        "images": asked.count,
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
        "class_counts": torch.bincount(open_folder(asked.out).labels, minlength=len(names)).tolist(),
    }
    replace_text(asked.out / RESULT, json.dumps(plain(result), indent=1, sort_keys=True) + "\n")
    return result


def plan(asked: GenerateCommand) -> dict[str, Any]:
    """What a run would take: images per call, memory, seconds; nothing is written."""
    from dfkd.data import MANIFEST, read_manifest
    from dfkd.synthesis.pipeline import GuidedPipeline
    from dfkd.synthesis.plan import make_plan, predict, seconds_of, table
    from dfkd.synthesis.run import run_on_record

    pipe, missing = pipeline_of(asked), asked.count
    if not isinstance(pipe, GuidedPipeline):
        raise UsageError(f"--plan-only with --method {pipe.name}", "its network calls are not known", "leave it out")
    found = make_plan(pipe, asked.generate)
    if (asked.out / MANIFEST).exists():
        missing -= sum(int(shard["count"]) for shard in read_manifest(asked.out)[1])
    pipe.call_size = found.call_size
    pipe.use_engines(run_on_record(asked.out).get("engines"))
    timings = predict(pipe, found, asked.generate.shards.image_format)
    for line in (*pipe.describe(), *table(found, timings, missing)):
        say(line)
    seconds = seconds_of(found, timings, missing)
    forecast = {
        "images": missing,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "predicted_seconds": round(seconds, 3),
        "predicted_images_per_second": round(missing / seconds, 3) if missing else None,
    }
    return {"out": asked.out, "images": asked.count, "plan": {**found.to_json(), **forecast}}


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(GenerateCommand, run, COMMAND, argv))


if __name__ == "__main__":
    main()
