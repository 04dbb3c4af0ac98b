"""The two gradient paths and the published loop, in one table: images per second, gradient cosine, student accuracy.

    python -m benchmarks.guidance_paths --teacher runs/demo/teacher            speeds and cosines, about two minutes
    python -m benchmarks.guidance_paths --teacher runs/demo/teacher --students  also a student per row, far longer

published   one image at a time, gradient through the UNet, two UNet calls a step, guidance and classifier-free guidance
            in every step, every image's own BN statistics, no refinement
unet        the `demo` preset with the gradient through the UNet: groups, late guidance with repeats, refinement
latent      the `demo` preset: the same with the gradient through decoder and teacher only

All rows take the preset's number of steps, loss weights and length of a guidance step. Speeds are measured in turns
(published, unet, latent, published, ...) in one process, and the ratio is taken within a turn. The published row's
student learns from images that were computed in batches: an image does not depend on its batch, so they are the same.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, name_of
from benchmarks.quality import DATA, call
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.cli.prepare import prepare
from dfkd.files import replace_text
from dfkd.presets import PRESETS
from dfkd.synthesis.prompts import labels_of, prompt_of
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import INITIAL_NOISE, Denoiser, clean_estimate
from dfkd_kernels.philox import philox_normal

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, dict[str, Any]] = {
    "published": {
        "gradient": "unet",
        "bn_stats": "image",
        "guidance_repeats": 1,
        "guide_from": 0,
        "cfg_to": 1,
        "refine_steps": 0,
    },
    "unet": {"gradient": "unet"},
    "latent": {"gradient": "latent"},
}


def flags(overrides: dict[str, Any]) -> list[str]:
    return [part for name, value in overrides.items() for part in ("--" + name.replace("_", "-"), str(value))]


def options_of(
    teacher: Path, device: str, out: Path, overrides: dict[str, Any], more: Sequence[str]
) -> GenerateOptions:
    """The options of dfkd-generate: those of the demo preset with a row's overrides."""
    words = ["--preset", "demo", "--teacher-checkpoint", str(teacher), "--device", device, "--out", str(out)]
    return parse(GenerateOptions, [*words, *flags(overrides), *more], "dfkd-generate", PRESETS)


def unet_calls(synthesis: Synthesis) -> int:
    """UNet calls for an image (of two rows where classifier-free guidance acts); a guided `unet` step repeats them."""
    settings, steps = synthesis.settings, len(synthesis.table)
    guided = sum(settings.guided(i, steps) for i in range(steps))
    return steps + (guided * settings.guidance_repeats if settings.gradient == "unet" else 0)


def timed(synthesis: Synthesis, group: int, images: int) -> float:
    """Seconds for an image: `images` of them sampled in groups of `group`."""
    own = replace(synthesis, group=group)
    started = time.perf_counter()
    for number in range(images // group):
        own.sample(number, group)
    if synthesis.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / images


def speeds(rows: dict[str, Synthesis], singles: int, repeats: int) -> dict[str, list[float]]:
    """Seconds an image of every row, `repeats` turns after one warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, synthesis in rows.items():
            group, images = (1, singles) if name == "published" else (synthesis.group, synthesis.group)
            if turn == 0:
                images = group
            spent = timed(synthesis, group, images)
            if turn:
                seconds[name].append(spent)
    return seconds


def cosines(latent: Synthesis, unet: Synthesis, micro: int) -> dict[str, float]:
    """Cosine of the two paths' gradients in z_t at noise levels along an unguided trajectory, mean over images."""
    points, steps = unguided(latent, micro), len(latent.table)
    wanted = sorted({round(share * (steps - 1)) for share in (0.1, 0.3, 0.5, 0.7, 0.9)})
    return {
        f"{i + 1}/{steps}": cosine(*(gradient_at(one, points[i], i, True, micro) for one in (latent, unet)))
        for i in wanted
    }


def unguided(synthesis: Synthesis, micro: int) -> list[Tensor]:
    """Latents [G, C, h, w] of group 0 before every step, without the teacher and with classifier-free guidance."""
    ids, table = torch.arange(synthesis.group, device=synthesis.device), synthesis.table
    denoise, shape = denoiser(synthesis, micro), (synthesis.prior.latent_channels, *synthesis.latent_size)
    z = table.init_scale * philox_normal(synthesis.seed, ids, INITIAL_NOISE, shape)
    before, found = torch.zeros_like(z), []
    for i in range(len(table)):
        found.append(z)
        row = table.row(i)
        with torch.no_grad():
            model = denoise(z, torch.as_tensor(row.timestep, device=z.device), True)
        z0 = row.z0_z * z + row.z0_model * model
        z = row.step_z * z + row.step_model * model + row.step_prev * before
        if row.step_noise:
            z = z + row.step_noise * philox_normal(synthesis.seed, ids, 1 + i, shape)
        before = z0
    return found


def gradient_at(synthesis: Synthesis, z: Tensor, step: int, with_cfg: bool, micro: int) -> Tensor:
    """A synthesis's own guidance gradient at the latents z [G, C, h, w] of group 0 before a step, like z.

    The latent path's is that in z0hat; the factor dz0hat/dz_t with the UNet held constant is a positive number per
    step, which a cosine does not see.
    """
    assert synthesis.guidance
    row, denoise = synthesis.table.row(step), denoiser(synthesis, micro)
    t = torch.as_tensor(row.timestep, device=z.device)
    to_latent = clean_estimate(denoise, row, t, with_cfg)
    if synthesis.settings.gradient == "latent":
        with torch.no_grad():
            model = denoise(z, t, with_cfg)
        z, to_latent = row.z0_z * z + row.z0_model * model, None
    labels = labels_of(torch.arange(len(z)), synthesis.classes).to(z.device)
    return synthesis.guidance.gradient(z, labels, micro, to_latent)[0]


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two gradients [G, C, h, w], the mean over images."""
    return F.cosine_similarity(one.flatten(1), other.flatten(1)).mean().item()


def denoiser(synthesis: Synthesis, micro: int) -> Denoiser:
    """The network with the prompts of group 0."""
    labels = labels_of(torch.arange(synthesis.group), synthesis.classes).tolist()
    prompts = [prompt_of(synthesis.prompt, synthesis.teacher.class_names[label]) for label in labels]
    embeddings = (synthesis.prior.encode_prompts(texts) for texts in (prompts, [synthesis.negative_prompt]))
    return Denoiser(synthesis.prior, *embeddings, synthesis.settings.cfg, micro)


def student_accuracy(teacher: Path, folder: Path, overrides: dict[str, Any], seed: int, split: str) -> float:
    """Synthesise with a row's settings, distil, test."""
    data = folder / "synthetic"
    common = ["--preset", "demo", "--teacher-checkpoint", teacher, "--seed", seed]
    call("dfkd-generate", *common, "--out", data, *flags(overrides))
    test = ["--test", DATA, "--test-split", split]
    return float(call("dfkd-distill", *common, "--data", data, "--out", folder / "student", *test)["accuracy"])


def markdown(result: dict[str, Any]) -> str:
    """The table of a recorded result."""
    lines = [
        "| path | UNet calls an image | images at a time | img/s: median (min to max) | ratio | student |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        accuracy = "not run" if row["student_accuracy"] is None else f"{100 * row['student_accuracy']:.1f} %"
        spread = f"{row['images_per_second']:.2f} ({row['slowest']:.2f} to {row['fastest']:.2f})"
        cells = [name, row["unet_calls"], row["images_at_a_time"], spread, f"{row['ratio']:.1f}", accuracy]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    cosine = ", ".join(f"{value:.2f} at step {step}" for step, value in result["gradient_cosine"].items())
    machine = result["machine"]
    lines += [
        "",
        "The `demo` preset"
        + (f" with `{result['generate']}`" if result["generate"] else "")
        + f". Cosine of the latent path's gradient with the UNet path's: {cosine}. {result['steps']} steps, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of dfkd-train-teacher; trained here when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--singles", type=int, default=4, help="images of the published loop per turn (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--students", action="store_true", help="also distil a student per row")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="real images for the students")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", default="", help="more options of dfkd-generate, as one string")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/guidance_paths-<device>.json")
    parser.add_argument("--rehearse", action="store_true", help="a teacher of one epoch, groups of 16: to see it run")
    a = parser.parse_args()
    if a.record and a.rehearse:
        parser.error("a rehearsal is not recorded")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if a.teacher is None:
            a.teacher = folder / "teacher"
            quick = ["--epochs", 1] if a.rehearse else []
            call("dfkd-train-teacher", "--preset", "demo", "--out", a.teacher, "--seed", a.seed, *quick)
        more = [
            *a.generate.split(),
            *(["--group", "16", "--batch", "16", "--shard-size", "16", "--steps", "3"] if a.rehearse else []),
        ]
        rows = {
            name: prepare(options_of(a.teacher, a.device, folder, overrides, more)) for name, overrides in ROWS.items()
        }
        seconds = speeds(rows, a.singles, a.repeats)
        result: dict[str, Any] = {
            "machine": describe(rows["latent"].device),
            "steps": len(rows["latent"].table),
            "generate": a.generate,
            "gradient_cosine": cosines(rows["latent"], rows["unet"], rows["latent"].group),
            "rows": {},
        }
        for name, spent in seconds.items():
            ratios = [p / s for p, s in zip(seconds["published"], spent, strict=True)]
            accuracy = None
            if a.students:
                accuracy = student_accuracy(a.teacher, folder / name, ROWS[name], a.seed, a.split)
            result["rows"][name] = {
                "unet_calls": unet_calls(rows[name]),
                "images_at_a_time": 1 if name == "published" else rows[name].group,
                "images_per_second": 1 / median(spent),
                "slowest": 1 / max(spent),
                "fastest": 1 / min(spent),
                "ratio": median(ratios),
                "student_accuracy": accuracy,
            }
    print(markdown(result), file=sys.stderr)
    if a.record:
        kind = "cpu" if a.device == "cpu" else name_of(result["machine"])
        RESULTS.mkdir(exist_ok=True)
        replace_text(RESULTS / f"guidance_paths-{kind}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
