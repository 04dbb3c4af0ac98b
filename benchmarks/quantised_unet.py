"""What narrow networks cost in quality, of 8 or 16 bits: errors, images, gradients, a student, and speeds of a CPU.

    python -m benchmarks.quantised_unet --teacher runs/demo/teacher              about ten minutes on two cores
    python -m benchmarks.quantised_unet --teacher runs/demo/teacher --students   also a student per row

The `demo` preset. none (float32), int8, fp8: the UNet is an engine of ONNX Runtime, everything else runs eagerly and in
float32. fp16, bf16: UNet and decoder in half precision, all of it eagerly, the guidance gradient through the decoder
too. Of each row:

prediction  relative error of the UNet's prediction against float64, on unguided trajectories of seeds that the
            calibration did not see; mean and worst of images and steps
gradient    cosine of the row's guidance gradient at its own clean estimate with eager's at eager's, mean over images,
            along the same trajectories: what a guided step is told
images      mean absolute difference to eager's images of the same seeds, of 255, unguided and guided. Guidance
            amplifies rounding, so the row `none` is what the difference of two float32 programs comes to.
img/s       guided images, rows in turns. ONNX Runtime computes 8-bit graphs wide on a CPU: no evidence for a GPU.
student     distilled on the row's images; that of `none` on eager's
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.guidance_paths import student_accuracy, timed
from benchmarks.machine import describe
from benchmarks.quality import call
from dfkd.config import QUANTISE_NAMES
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.cli.prepare import prepare
from dfkd.compiled.choose import Choice, apply
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import DIGESTS, architecture_of, request
from dfkd.compiled.sources import sources_of
from dfkd.files import replace_text
from dfkd.presets import PRESETS
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import INITIAL_NOISE, Denoiser
from dfkd.synthesis.schedule import Step
from dfkd_engine.store import EngineStore
from dfkd_kernels.philox import philox_normal

RESULTS = Path(__file__).parent / "results"
BACKEND = "onnxruntime"
IMAGES = 40  # of the trajectories; their float64 predictions take most of the time
UNSTEADY = 2  # times the slowest turn's speed, above which a speed is not quoted
HALVES = ("fp16", "bf16")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the steps, where gradients are compared


class Point(NamedTuple):
    """A step of an unguided trajectory of eager's: latents z [B, C, h, w] at time t, and the prompts [B, L, D]."""

    number: int
    row: Step
    z: Tensor
    t: Tensor
    context: Tensor
    labels: Tensor


def trajectory(eager: Synthesis, images: int) -> Iterator[Point]:
    ids = torch.arange(images, device=eager.device)
    labels = labels_of(ids.cpu(), eager.classes)
    names = [eager.teacher.class_names[i] for i in labels.tolist()]
    conditional = eager.prior.encode_prompts([prompt_of(eager.prompt, name) for name in names])
    unconditional = eager.prior.encode_prompts([eager.negative_prompt])
    denoise = Denoiser(eager.prior, conditional, unconditional, eager.settings.cfg, images)
    shape = (eager.prior.latent_channels, *eager.latent_size)
    z = eager.table.init_scale * philox_normal(eager.seed, ids, INITIAL_NOISE, shape)
    before = torch.zeros_like(z)
    for i in range(len(eager.table)):
        row = eager.table.row(i)
        t = torch.as_tensor(row.timestep, device=z.device, dtype=torch.float32)
        yield Point(i, row, z, t, conditional, labels.to(z.device))
        with torch.no_grad():
            model = denoise(z, t, eager.settings.classifier_free(i, len(eager.table)))
        clean = row.z0_z * z + row.z0_model * model
        z = row.step_z * z + row.step_model * model + row.step_prev * before
        if row.step_noise:
            z = z + row.step_noise * philox_normal(eager.seed, ids, 1 + i, shape)
        before = clean


@torch.no_grad()
def prediction_errors(eager: Synthesis, rows: dict[str, Synthesis], images: int) -> dict[str, list[float]]:
    """Relative errors against float64 of every row, one for each image and step."""
    exact = sources_of(eager).doubled().prior
    found: dict[str, list[float]] = {name: [] for name in rows}
    for point in trajectory(eager, images):
        want = exact.denoise(point.z.double(), point.t.double(), point.context.double()).flatten(1)
        for name, synthesis in rows.items():
            got = synthesis.prior.denoise(point.z, point.t, point.context).double().flatten(1)
            found[name] += ((got - want).norm(dim=1) / want.norm(dim=1)).tolist()
    return found


def gradient_cosines(eager: Synthesis, rows: dict[str, Synthesis], images: int) -> dict[str, dict[str, float]]:
    """Step -> cosine with the gradient at eager's clean estimate, for every row."""
    found: dict[str, dict[str, float]] = {name: {} for name in rows}
    steps = len(eager.table)
    wanted = {round(share * (steps - 1)) for share in SHARES}
    for point in trajectory(eager, images):
        if point.number not in wanted:
            continue

        def gradient(synthesis: Synthesis, point: Point = point) -> Tensor:
            with torch.no_grad():
                model = synthesis.prior.denoise(point.z, point.t, point.context)
            clean = point.row.z0_z * point.z + point.row.z0_model * model
            assert synthesis.guidance
            return synthesis.guidance.gradient(clean, point.labels, images)[0].flatten(1)

        want = gradient(eager)
        for name, synthesis in rows.items():
            cosine = F.cosine_similarity(gradient(synthesis), want).mean().item()
            found[name][f"{point.number + 1}/{steps}"] = cosine
    return found


def image_differences(eager: Synthesis, rows: dict[str, Synthesis]) -> dict[str, float]:
    """Mean absolute difference to eager's images of one group, of 255."""
    want = eager.sample(0, eager.group)[0].double()
    return {name: (own.sample(0, own.group)[0].double() - want).abs().mean().item() for name, own in rows.items()}


def unguided(synthesis: Synthesis) -> Synthesis:
    return replace(synthesis, guidance=None)


def build(words: list[str], engines: Path) -> dict[str, Synthesis]:
    """Every row with its engine, built where the folder lacks it; and "eager". Rows of HALVES run eagerly."""
    found: dict[str, Synthesis] = {}
    for name in QUANTISE_NAMES:
        more = [*words, "--quantise", name]
        call("dfkd-engines", "build", "--backend", BACKEND, "--only", "unet", "--engines", engines, "--", *more)
        options = parse(GenerateOptions, [*more, "--out", "."], "dfkd-generate", PRESETS)
        store, memory = EngineStore(engines), FileDigests(engines / DIGESTS)
        manifest = store.find(request(options, "unet", BACKEND, architecture_of("cpu"), memory).recipe)
        assert manifest is not None
        eager = prepare(options)
        found.setdefault("eager", eager)
        found[name] = apply(eager, sources_of(eager), [Choice("unet", BACKEND, manifest.key, "")], store)
    for name in HALVES:
        found[name] = prepare(parse(GenerateOptions, [*words, "--dtype", name, "--out", "."], "dfkd-generate", PRESETS))
    return found


def _steady(row: dict[str, Any]) -> bool:
    return bool(row["fastest"] <= UNSTEADY * row["slowest"])


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result."""
    heads = ["UNet", "prediction error: mean (worst)", "gradient cosine", "images: unguided, guided", "student"]
    heads += ["img/s: median (min to max)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in result["rows"].items():
        cosine = row["gradient_cosine"].values()
        accuracy = "not run" if row["student_accuracy"] is None else f"{100 * row['student_accuracy']:.1f} %"
        cells = [
            "float32" if name == "none" else name,
            f"{row['prediction_error']:.1e} ({row['worst_prediction_error']:.1e})",
            f"{min(cosine):.4f} to {max(cosine):.4f}",
            f"{row['unguided_difference']:.2f}, {row['guided_difference']:.2f}",
            accuracy,
            f"{row['images_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f})" if _steady(row) else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = result["machine"]
    lines += [
        "",
        f"The `demo` preset; the UNet on ONNX Runtime, in fp16 and bf16 all eagerly; images: mean absolute difference "
        f"to eager's in float32, of 255. On a CPU ONNX Runtime computes 8 bits wide, and half precision may be slow: "
        f"img/s are no evidence for a GPU, where nothing was measured; - where other work on the machine made turns "
        f"differ by more than {UNSTEADY} times. Seed "
        f"{result['seed']}, {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"{machine['date']}: `python -m benchmarks.quantised_unet --students`.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher; trained here when absent")
    parser.add_argument("--engines", type=Path, help="folder of engines to use and keep (default: built for this run)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the speeds (default 3)")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of the trajectories (default {IMAGES})")
    parser.add_argument("--students", action="store_true", help="also distil a student per row")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="real images for the students")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/quantised-unet-cpu.json")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if a.teacher is None:
            a.teacher = folder / "teacher"
            call("dfkd-train-teacher", "--preset", "demo", "--out", a.teacher, "--seed", a.seed)
        engines = a.engines or folder / "engines"
        words = ["--preset", "demo", "--teacher-checkpoint", str(a.teacher), "--device", "cpu", "--seed", str(a.seed)]
        rows = build(words, engines)
        eager = rows.pop("eager")
        result: dict[str, Any] = {"machine": describe(eager.device), "seed": a.seed, "images": a.images, "rows": {}}
        errors = prediction_errors(eager, rows, a.images)
        cosines = gradient_cosines(eager, rows, a.images)
        without = image_differences(unguided(eager), {name: unguided(own) for name, own in rows.items()})
        guided = image_differences(eager, rows)  # the first call of every row, so the turns below find it warm
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(a.repeats):
            for name, own in rows.items():
                seconds[name].append(timed(own, own.group, own.group))
        for name, spent in seconds.items():
            accuracy = None
            if a.students:
                overrides = {"quantise": name, "engines": engines}
                if name == "none" or name in HALVES:
                    overrides = {"backend": "eager"} | ({"dtype": name} if name in HALVES else {})
                accuracy = student_accuracy(a.teacher, folder / name, overrides, a.seed, a.split)
            result["rows"][name] = {
                "prediction_error": sum(errors[name]) / len(errors[name]),
                "worst_prediction_error": max(errors[name]),
                "gradient_cosine": cosines[name],
                "unguided_difference": without[name],
                "guided_difference": guided[name],
                "images_per_second": 1 / median(spent),
                "slowest": 1 / max(spent),
                "fastest": 1 / min(spent),
                "student_accuracy": accuracy,
            }
    print(markdown(result), file=sys.stderr)
    if a.record:
        replace_text(RESULTS / "quantised-unet-cpu.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
