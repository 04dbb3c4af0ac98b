"""What presets with Stable Diffusion 1.5 at 512x512 cost: FLOP, counted, and GPU-hours at shares of a peak, assumed.

    python -m benchmarks.cost --record        minutes; random weights, no GPU, nothing is downloaded

Counted are the network calls that the pipeline of a preset makes, traced without data, FLOP as of benchmarks/flops.py:
not the teacher's look at finished images (a hundred-thousandth), the text encoder, norms, noise and files. Hours are
FLOP / (peak x share): the peak is the data sheet's, the shares are assumptions until benchmarks.bench_sampling and
benchmarks.bench_distill have measured them on a GPU.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sd15
from benchmarks.bench_distill import Pair
from benchmarks.bench_distill import flop as flop_of_step
from benchmarks.flops import SHEETS
from benchmarks.machine import describe
from benchmarks.recording import RESULTS, finish, number, scaled, table
from dfkd import teachers
from dfkd.config import NORMALISATIONS, DistillConfig, GenerateConfig, TeacherTrainConfig, leaves, read_preset, section
from dfkd.files import replace_text
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.synthesis.plan import flop_of_trajectory, needs_of
from dfkd.teachers import Classifier
from dfkd.training.decoder import make_decoder, save_decoder
from dfkd.training.distill import split
from dfkd.training.loop import order_of
from dfkd.training.world import World
from dfkd_engine.memory import most_rows, weight_bytes
from dfkd_engine.priors.prior import Prior

FILE = RESULTS / "cost.json"
COMMAND = "python -m benchmarks.cost --record"
PRESETS = ("cifar10", "cifar10-fast", "domainnet-sketch", "domainnet-quickdraw", "domainnet-fast")
CIFAR10_IMAGES = 50_000  # that its teachers learn from
SOME_IMAGES = 1000  # where the number of real images is the user's
GPU, PRECISION, MEMORY = "H100", "bfloat16", 0.85 * 80e9  # bytes that a plan uses of the card's
SYNTHESIS_SHARES = (0.5, 0.3, 0.15, 0.08)
TRAINING_SHARES = (0.25, 0.1, 0.05)
TAESD = (64, 3)  # width and blocks of the tiny decoder of Stable Diffusion


@dataclass(frozen=True)
class Step:
    """A step on the way from the published loop to the fast preset: what it changes beside those before it.

    flags: for people. changes: of the settings, by flat name.
    """

    name: str
    flags: str
    changes: Mapping[str, Any]


def way(tiny: Path) -> tuple[Step, ...]:
    """The steps from `cifar10` to `cifar10-fast`, with one teacher. tiny: folder of a decoder of TAESD's sizes."""
    group = {"bn_stats": "group", "bn_loss": "relative", "group": 200}
    unguided = {"guidance_step": 0.0, "cfg_to": 1.0, "guidance_decoder": None, "keep_intermediates": 0}
    return (
        Step("published loop, five images of a trajectory", "", {}),
        Step("its last image alone", "--keep-intermediates 0", {"keep_intermediates": 0, "cutmix_every": 0}),
        Step("gradient to the clean latent", "--gradient latent", {"gradient": "latent"}),
        Step("20 steps", "--sampler ddim --steps 20", {"sampler": "ddim", "steps": 20}),
        Step("the teacher in the last 12 of them", "--guide-from 0.4", {"guide_from": 0.4}),
        Step("classifier-free rows in the other 8 alone", "--cfg-to 0.4", {"cfg_to": 0.4}),
        Step("statistics of 200 images, in several calls: `cifar10-fast`", "--bn-stats group --group 200", group),
        Step("gradient through a decoder of TAESD's sizes", "--guidance-decoder", {"guidance_decoder": str(tiny)}),
        Step("five images of a trajectory again", "--keep-intermediates 4", {"keep_intermediates": 4}),
        Step("no teacher, 20 steps", "--guidance-step 0 --cfg-to 1", unguided),
    )


def classifier(architecture: str, classes: Sequence[str]) -> Classifier:
    """A network of the zoo with the weights that torch begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = teachers.build(architecture, len(classes))
    side = teachers.input_size(architecture)
    return Classifier(module, tuple(classes), *NORMALISATIONS["cifar10"], side, architecture)


def pipeline(prior: Prior, preset: str, architecture: str, **changes: Any) -> GuidedPipeline:
    """The pipeline of a preset, on a teacher and, where its losses go by one, a student with random weights.

    changes: of the settings, by flat name; calls hold the images that the settings say.
    """
    own, student = read_preset(preset), None
    classes = section(own, "generate")["classes"]
    plain = {"device": "cpu", "dtype": "bf16", "backend": "eager", "kernels": "torch", "attention": "sdpa"}
    config = GenerateConfig.preset(preset, **{**plain, **changes})
    if config.takes_student:
        student = classifier(section(own, "distill")["student"], classes)
    return GuidedPipeline(prior, classifier(architecture, classes), config, student)


def synthesis(pipe: GuidedPipeline) -> dict[str, Any]:
    """What a trajectory of a pipeline takes: {"snapshots", "flop", "parts", "call"}, the images that come of it, FLOP,
    those of a call of each network for it, and how many trajectories a call of any network can hold, by the card's
    memory and by what convolutions can index."""
    needs, snapshots = needs_of(pipe), 1 + pipe.config.sampling.keep_intermediates
    networks = [*pipe.prior.networks.values(), pipe.teacher.module]
    networks += [pipe.guidance_decoder.network] if pipe.guidance_decoder else []
    left = int(MEMORY) - weight_bytes(*networks)
    call = min(min(need.most_rows(left), most_rows(need.elements)) for need in needs.values())
    parts = {name: need.flop for name, need in needs.items()}
    return {"snapshots": snapshots, "flop": flop_of_trajectory(pipe, needs, snapshots), "parts": parts, "call": call}


def steps_of(prior: Prior, tiny: Path, **changes: Any) -> Iterator[dict[str, Any]]:
    """A row for each step of `way`. changes: of all of them."""
    settings = dict(changes)
    for step in way(tiny):
        settings |= step.changes
        pipe = pipeline(prior, "cifar10", "wrn40_2", **settings)
        yield {"name": step.name, "flags": step.flags, **synthesis(pipe)}


def presets_of(prior: Prior, **changes: Any) -> Iterator[dict[str, Any]]:
    """A row for each preset: its own settings as they are, and what its images take."""
    for name in PRESETS:
        own = section(read_preset(name), "generate")
        found = synthesis(pipeline(prior, name, own["teacher"], **changes))
        yield {"preset": name, "generate": own, "images": own["count"], **found}


def training_of(preset: str) -> Iterator[dict[str, Any]]:
    """Rows of a preset's trainings: {"what", "networks", "images", "flop"}, images shown and FLOP of one of them."""
    own = read_preset(preset)
    teaching, learning, rounds = (section(own, name) for name in ("teacher", "distill", "rounds"))
    teacher, student, count = teaching["architecture"], learning["student"], section(own, "generate")["count"]
    side, real = teachers.input_size(teacher), CIFAR10_IMAGES if preset.startswith("cifar10") else SOME_IMAGES
    config = TeacherTrainConfig.preset(preset)
    yield {
        "preset": preset,
        "what": "teacher" if real == CIFAR10_IMAGES else f"teacher, of every {real} real images",
        "networks": f"{teacher}, {side}x{side}",
        "images": order_of(config.train, real, World(torch.device("cpu"))).length,
        "flop": flop_of_training(teacher, side),
    }
    pair = Pair(teacher, student, side, 2)
    common = {"preset": preset, "networks": str(pair), "flop": flop_of_step(pair) // pair.batch}
    yield {**common, "what": "student", "images": shown(DistillConfig.preset(preset), count)}
    if rounds:
        refresh = {name: value for name, value in rounds.items() if name in leaves(DistillConfig)}
        phase = count // rounds["rounds"] * rounds["refresh_every"]
        parts = range(phase, count, phase)
        images = sum(shown(DistillConfig.preset(preset, **refresh), part) for part in parts)
        yield {**common, "what": f"student, refreshed {len(parts)} times", "images": images}


def shown(config: DistillConfig, count: int) -> int:
    """Images that a student is shown in its training on `count` of them, less those that are held out."""
    rows, _ = split(torch.arange(count), config.held_out)
    return order_of(config.train, len(rows), World(torch.device("cpu"))).length


def flop_of_training(architecture: str, side: int) -> int:
    """FLOP of an image, forward and backward."""
    network = teachers.build(architecture, 10)
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(2, 3, side, side)).sum().backward()
    return counter.get_total_flops() // 2


def measure(thin: bool = False) -> dict[str, Any]:
    """All rows. thin: of networks with few channels and images of 64x64, for tests."""
    size = 64 if thin else 512
    prior = sd15.make_prior(size, "bf16", thin)
    with tempfile.TemporaryDirectory(prefix="dfkd-") as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_decoder(make_decoder(prior, *TAESD), Path(folder), torch.bfloat16)
        steps = list(steps_of(prior, Path(folder), size=size))
    return {
        "command": COMMAND,
        "machine": describe(torch.device("cpu")),
        "peak": SHEETS[GPU].flops[PRECISION],
        "size": size,
        "steps": steps,
        "presets": list(presets_of(prior, size=size)),
        "training": [row for preset in PRESETS for row in training_of(preset)],
    }


def way_table(result: Mapping[str, Any]) -> str:
    """From the published loop to the fast preset, a change a row: all of it counted."""
    first = result["steps"][0]
    rows = [
        (
            row["name"], f"`{row['flags']}`" if row["flags"] else None, scaled(row["flop"], "FLOP"), row["snapshots"],
            scaled(row["flop"] / row["snapshots"], "FLOP"), number(first["flop"] / row["flop"]),
            number(first["flop"] / first["snapshots"] / (row["flop"] / row["snapshots"])), row["call"],
        )
        for row in result["steps"]
    ]  # fmt: skip
    heads = (
        "one change after another", "flags", "a trajectory", "images of it", "an image", "trajectory: times less",
        "image: times less", "most a call, 80 GB",
    )  # fmt: skip
    loop, latent = (result["steps"][i]["parts"] for i in (0, 2))
    through = (loop["gradient"] - latent["gradient"]) / 2
    parts = (
        f"A row of the UNet is {scaled(loop['unet'] / 2, 'FLOP')}, {scaled(through, 'FLOP')} with its gradient; a"
        f" decoding {scaled(loop['decode'], 'FLOP')}, {scaled(latent['gradient'], 'FLOP')} with its gradient and the"
        " teacher's."
    )
    return "\n".join([*table(heads, rows), "", parts, counted_by(result)])


def presets_table(result: Mapping[str, Any]) -> str:
    """What the images of each preset take: FLOP counted, hours at assumed shares of the peak."""
    rows = []
    for row in result["presets"]:
        flop = row["images"] // row["snapshots"] * row["flop"]
        hours = [number(_hours(flop, result["peak"], share)) for share in SYNTHESIS_SHARES]
        each, trajectories = flop / row["images"], row["images"] // row["snapshots"]
        cells = (f"`{row['preset']}`", row["images"], trajectories, scaled(each, "FLOP"), number(flop / 1e15))
        rows.append((*cells, *hours))
    heads = ("preset", "images", "trajectories", "an image", "all, PFLOP", *map(_at, SYNTHESIS_SHARES))
    return "\n".join([*table(heads, rows), "", counted_by(result)])


def training_table(result: Mapping[str, Any]) -> str:
    """What teachers and students of each preset take: FLOP counted, hours at assumed shares of the peak."""
    rows = []
    for row in result["training"]:
        flop = row["images"] * row["flop"]
        minutes = [number(60 * _hours(flop, result["peak"], share)) for share in TRAINING_SHARES]
        cells = (f"`{row['preset']}`", row["what"], row["networks"], scaled(row["images"]), scaled(row["flop"], "FLOP"))
        rows.append((*cells, number(flop / 1e15), *minutes))
    shares = (_at(share, "minutes") for share in TRAINING_SHARES)
    heads = ("preset", "what", "networks", "images shown", "one of them", "all, PFLOP", *shares)
    return "\n".join([*table(heads, rows), "", counted_by(result)])


def counted_by(result: Mapping[str, Any]) -> str:
    """The last sentence under a table."""
    machine = result["machine"]
    return (
        f"FLOP are counted, at {result['size']}x{result['size']}; hours are these FLOP over a share of"
        f" {scaled(result['peak'], 'FLOP/s')}, and nothing that was measured."
        f" torch {machine['versions']['torch']}, commit {machine['commit']}, {machine['date']}: `{result['command']}`."
    )


def _at(share: float, unit: str = "hours") -> str:
    return f"{unit} if at {100 * share:.0f} %"


def _hours(flop: float, peak: float, share: float) -> float:
    return flop / (peak * share) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/cost.json")
    a = parser.parse_args()
    result = measure()
    finish(result, "\n\n".join(render(result) for render in (way_table, presets_table, training_table)))
    if a.record:
        replace_text(FILE, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
