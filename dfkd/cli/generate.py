"""dfkd-generate: a frozen teacher and a frozen diffusion prior -> labelled synthetic images in shards."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import command, plain, save_settings
from dfkd.cli.prepare import prepare
from dfkd.cli.progress import progress
from dfkd.runtime import device_of
from dfkd.compiled.choose import Choice, apply, choose, in_words
from dfkd.compiled.requests import gradient_rows
from dfkd.compiled.sources import sources_of
from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_text
from dfkd.data.imagefolder import export_imagefolder
from dfkd.runtime import choose_kernels
from dfkd.synthesis.planning.data_sheets import devices_of
from dfkd.synthesis.planning.elsewhere import predict_elsewhere, work_of_group
from dfkd.synthesis.planning.plan import make_plan
from dfkd.synthesis.planning.remembered import Remembered
from dfkd.synthesis.planning.seconds import predict
from dfkd.synthesis.planning.smaller import Smaller
from dfkd.synthesis.planning.words import as_json, elsewhere_as_json, elsewhere_in_words
from dfkd.synthesis.planning.words import in_words as plan_in_words
from dfkd.runtime import own_rank
from dfkd.data.shards import ShardFolder, open_folder, read_manifest, require_space
from dfkd.data.shards.layout import MANIFEST
from dfkd.synthesis.run import Synthesis, synthesise
from dfkd_engine.group_norms import group_norms
from dfkd_engine.store import EngineStore

COMMAND = "dfkd-generate"
RESULT = "result.json"
IMAGE_FOLDER = "imagefolder"
PLAN_TRIAL = 5e10  # FLOP of a trial where the prediction is all that is asked for


# What decides where and in which portions a run is computed, and not what comes out. --kernels is among them as --batch
# and --device are: the same arithmetic, whose results differ by rounding.
_NOT_IDENTITY = (
    *("out", "batch", "micro_batch", "device", "format", "count", "image_format", "shard_size"),
    *("teacher", "teacher_checkpoint", "student_checkpoint", "prior", "classes", "backend", "engines", "attention"),
    *("kernels", "plan_only", "plan_for"),
    "quantise",  # a quantised UNet is told by its engine's key
)


def identity(options: GenerateOptions, synthesis: Synthesis, choices: Sequence[Choice] = ()) -> dict[str, Any]:
    """What a run's pixels follow from, as plain JSON values; a folder takes no others.

    choices: engines are named by their keys, since they differ from eager networks in the last bits.
    """
    chosen = {name: value for name, value in asdict(options).items() if name not in _NOT_IDENTITY}
    student = synthesis.guidance.student if synthesis.guidance else None
    chosen |= {
        "prior_digest": synthesis.prior.weights_digest,
        "prior_scaling_factor": synthesis.prior.scaling_factor,
        "scheduler": {k: v for k, v in synthesis.prior.scheduler_config.items() if k != "_diffusers_version"},
        "teacher_digest": synthesis.teacher.digest(),
        "student_digest": student.digest() if student else None,
        "size": synthesis.latent_size[0] * synthesis.prior.vae_scale_factor,
    }
    if compiled := {choice.network: choice.key for choice in choices if choice.key}:
        chosen["engines"] = compiled
    result: dict[str, Any] = plain(chosen)
    return result


def build_command(options: GenerateOptions) -> str:
    """The command that builds the engines of a run with these options."""
    own = ("out", "count", "backend", "engines", "seed", "format", "image_format", "shard_size", "only")
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in (*own, "plan_only", "plan_for") or value == field.default:
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += ["--" + field.name.replace("_", "-"), text]
    backend = [] if options.backend == "auto" else ["--backend", options.backend]
    if options.quantise != "none" and not backend:
        backend = ["--only", "unet"]  # the others may be of any backend, or eager
    return shlex.join(["dfkd-engines", "build", *backend, "--engines", str(options.engines), "--", *words])


def engines_before(out: Path) -> dict[str, str] | None:
    """The engines that a folder was begun with, by network; None for a new folder. Raises UsageError."""
    if not (out / MANIFEST).exists():
        return None
    return dict(read_manifest(out)[0].settings.get("engines", {}))


def shards_before(out: Path) -> list[dict[str, Any]]:
    """The shards that a folder has on record; none of a new folder. Raises UsageError."""
    return read_manifest(out)[1] if (out / MANIFEST).exists() else []


def quieten_libraries() -> None:
    """No bars and hints of the libraries that load the networks; their errors still come through."""
    # Imported here and not above: they take seconds to load, which --help and a wrong option need not wait for.
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    disable_progress_bars()


def run(asked: GenerateOptions) -> dict[str, Any] | None:
    """Check, plan, synthesise what is missing, write OUT/result.json; with --plan-only the plan alone.

    Of the processes of torchrun each does this for its own shards; the first alone speaks, waits for all shards, and
    has a result, None in the others.
    """
    rank = own_rank()
    if asked.plan_only and not rank.first:
        return None
    device = device_of(asked.device, rank.local, rank.neighbours)
    options = asked if rank.neighbours == 1 else replace(asked, device=str(device))

    def say(text: str) -> None:
        if rank.first:
            print(text, file=sys.stderr)

    if not options.plan_only:
        make_writable(options.out)
    if not (rank.first and sys.stderr.isatty()):
        quieten_libraries()
    kernels = choose_kernels(options.kernels, device)  # before the networks are loaded
    synthesis = prepare(options, kernels.name)
    if options.plan_for:
        elsewhere = predict_elsewhere(options, synthesis, *devices_of(options.plan_for))
        say(elsewhere_in_words(elsewhere, options.count))
        return {"out": options.out, "images": options.count, "plan": elsewhere_as_json(elsewhere, options.count)}
    prior = synthesis.prior
    norms = (
        {part: str(group_norms(getattr(prior, part))) for part in ("unet", "vae")} if kernels.name == "triton" else {}
    )
    remembered = Remembered.of(options, synthesis)
    if remembered.problem:
        say(remembered.problem)
    plan = make_plan(options, synthesis, remembered.images(), rank.neighbours)
    # whether a group is cut, and so which networks it needs, may be decided by short memory
    cut = plan.rows.gradient < gradient_rows(options)
    fitting = replace(options, micro_batch=plan.rows.gradient) if cut else options
    choices = choose(fitting, EngineStore(options.engines), build_command(fitting), engines_before(options.out))
    eager = synthesis
    synthesis = apply(synthesis, sources_of(synthesis), choices, EngineStore(options.engines))
    for line in in_words(choices):
        say(line)
    taps = synthesis.guidance.taps if synthesis.guidance else None
    say(f"kernels: {kernels.name} ({kernels.why})")
    for part, found in norms.items():
        say(f"  where the {part} is eager: {found}")
    if taps is not None:
        say(f"  where the teacher is eager: {taps.in_words()}")
    timed = (synthesis, plan, choices, EngineStore(options.engines), options.image_format)
    if options.plan_only:
        timings, work = predict(*timed, trial=PLAN_TRIAL), work_of_group(eager, plan)
        images = options.count - sum(int(shard["count"]) for shard in shards_before(options.out))
        amount = -(-images // options.group), images
        say(plan_in_words(plan, timings, *amount, work))
        return {"out": options.out, "images": options.count, "plan": as_json(plan, timings, *amount, work)}
    timings = predict(*timed) if rank.first else {}
    size = synthesis.latent_size[0] * synthesis.prior.vae_scale_factor
    with ShardFolder.create_or_open(
        options.out,
        identity(options, synthesis, choices),
        synthesis.teacher.class_names,
        size,
        options.image_format,
        options.count,
        options.images_per_shard,
        rank,
    ) as folder:
        own, others = folder.missing(), folder.missing_of_others() if rank.first else []
        remaining = sum(len(folder.layout.ids(index)) for index in own)
        written = remaining + sum(len(folder.layout.ids(index)) for index in others)
        copies = options.count if options.format == "imagefolder" else 0
        require_space(options.out, written + copies, size, options.image_format)
        if rank.first:
            save_settings(asked, options.out, COMMAND)
        dropped = -options.count % options.group if own or others else 0
        say(
            f"{options.count} images of {size}x{size}, {written} to compute on {synthesis.device}"
            f" in {options.dtype}; groups of {options.group}"
            + (f"; {dropped} more complete the last group and are dropped" if dropped else "")
        )
        if rank.count > 1:
            say(
                f"{rank.count} processes share {folder.layout.shard_count()} shards;"
                f" {remaining} images are of the first, whose plan and progress follow"
            )
        amount = -(-remaining // options.group), remaining
        say(plan_in_words(plan, timings, *amount))
        smaller = Smaller(options, choices, remembered, build_command)
        started = time.perf_counter()
        with progress(remaining, "synthesis", "img", shown=rank.first) as bar:
            try:
                done = synthesise(folder, synthesis, plan.rows, bar.update, smaller)
            except FloatingPointError as error:
                raise UsageError(str(error), todo="lower --guidance-step, or use --dtype fp32") from None
        if not rank.first:
            return None
        folder.wait_for_others()
        seconds = time.perf_counter() - started
    if options.format == "imagefolder":
        export_imagefolder(options.out, options.out / IMAGE_FOLDER)
    result = {
        "out": options.out,
        "images": options.count,
        "images_written": written,
        "shards_written": len(own) + len(others),
        "shards_before": folder.layout.shard_count() - len(own) - len(others),
        "seconds": round(seconds, 3),
        "images_per_second": round(written / seconds, 3) if written else None,
        "processes": rank.count,
        "plan": as_json(plan, timings, *amount),
        "rows": asdict(done.rows),  # of the last group: fewer than planned after an out-of-memory error
        "backends": {choice.network: {"backend": choice.backend, "why": choice.why} for choice in choices},
        "kernels": {
            "name": kernels.name,
            "why": kernels.why,
            "group_norms": norms or None,
            "taps": taps.in_words() if taps else None,
        },
        "class_names": synthesis.teacher.class_names,
        "class_counts": torch.bincount(
            open_folder(options.out).labels, minlength=len(synthesis.teacher.class_names)
        ).tolist(),
    }
    replace_text(options.out / RESULT, json.dumps(plain(result), indent=1, sort_keys=True) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    sys.exit(command(GenerateOptions, run, COMMAND, argv))
