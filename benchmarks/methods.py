"""Every method of synthesis on the demo's world at equal core seconds: what students learn from the images of each.

    python -m benchmarks.methods --record

benchmarks/methods.toml names guided diffusion and the others, by their settings. As in the ablation (ablation.py), each
makes as many images as take the core seconds of the guided ones, in one process with one thread, and its student has
the steps and views of every other. No method has a student while images are made, so adversarial losses do not act.
Settings were tried on validation images (the default here); --split test is for the end. Stopped and started again it
goes on. With --record also results/methods-demo-cpu.json, -images.png and -losses.png, for docs/methods.md.
"""

import argparse
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from benchmarks import ablation
from benchmarks.ablation import Ablation, Row
from benchmarks.machine import describe
from benchmarks.recording import RESULTS, finish, not_measured, table, taken_on
from dfkd.data import open_folder
from dfkd.files import replace_text
from dfkd.runtime import resolve_device

FILE = Path(__file__).with_name("methods.toml")
NAME = "methods-demo-cpu"
GUIDED = "guided diffusion, as `--preset demo`"
TIMES = 2  # an image's pixels are shown so many times as wide
COLOURS = 128  # of the picture of images, which a palette keeps small


def read(out: Path, split: str = "validation", rehearse: bool = False) -> Ablation:
    """The rows of FILE behind guided diffusion. rehearse: tiny sizes."""
    file = tomllib.loads(FILE.read_text(encoding="utf-8"))
    rows = [Row(name, row.pop("says"), row) for name, row in file.pop("rows").items()]
    if rehearse:
        rows = [Row(row.name, row.says, {"generate": {"method": _shortened(row)}}) for row in rows]
    for section, changes in (ablation.REHEARSAL if rehearse else {}).items():
        file[section] = {**file.get(section, {}), **changes}
    file["evaluate"] = {**file.get("evaluate", {}), "split": split}
    return Ablation(file, (Row(ablation.DEFAULT, GUIDED), *rows), out, split)


def _shortened(row: Row) -> str:
    """A row's method in two steps, of a small generator where it has one."""
    name = row.differs["generate"]["method"].partition("(")[0]
    more = {"deepinversion": "", "generative": ", width=4, warmup=2"}.get(name, ", width=4")
    return f"{name}(steps=2{more})"


def markdown(result: Mapping[str, Any]) -> str:
    """The methods, the best first: images, core seconds, accuracy, settings."""
    ranked = sorted(result["rows"].values(), key=lambda row: -sum(row["accuracy"]))
    cells = []
    for row in ranked:
        method = row["differs"].get("generate", {}).get("method", "guided")
        accuracy = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        seconds = sum(row["seconds"]) / len(row["seconds"])
        cells.append([row["says"], accuracy, row["images"][0], f"{seconds:.0f}", f"`{method}`"])
    under = (
        f"Students of one network and {result['steps']} steps each, real images of the {result['split']} split, teacher"
        f" {100 * ranked[0]['teacher_accuracy'][0]:.1f} %. "
    )
    lines = table(["method", "student's accuracy %", "images", "core s", "settings"], cells)
    lines += ["", under + taken_on(result["machine"], f"python -m benchmarks.methods --split {result['split']}")]
    return "\n".join(lines + not_measured(result["failed"].items()))


def images_of(made: Ablation, row: Row, seed: int, columns: int) -> Image.Image:
    """A line of the newest image of each class, by which a method has learned most; grey where there is none."""
    pool = open_folder(made.job(row, seed).variants[0].generate.out)
    tiles = []
    for label in range(columns):
        found = (pool.labels == label).nonzero()[-1:, 0]
        tile = pool.read(found)[0] if len(found) else torch.full((3, pool.image_size, pool.image_size), 128).byte()
        tiles.append(tile.permute(1, 2, 0).numpy())
    line = Image.fromarray(np.concatenate(tiles, 1))
    return line.resize((TIMES * line.width, TIMES * line.height), Image.Resampling.NEAREST)


def picture(made: Ablation, seed: int) -> Image.Image:
    """A line of images for each row, one under the other in the file's order."""
    classes = len(open_folder(made.job(made.rows[0], seed).variants[0].generate.out).class_names)
    lines = [images_of(made, row, seed, classes) for row in made.rows]
    whole = Image.fromarray(np.concatenate([np.asarray(line) for line in lines]))
    return whole.quantize(COLOURS)


def draw_losses(made: Ablation, seed: int, file: Path) -> None:
    """Loss curves of every row, the mean over its images, as a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(made.rows), figsize=(2.2 * len(made.rows), 2.2), layout="constrained")
    for panel, row in zip(panels, made.rows, strict=True):
        records = list(open_folder(made.job(row, seed).variants[0].generate.out).records())
        for name in records[-1].loss_curve:
            curves = [record.loss_curve[name] for record in records if name in record.loss_curve]
            length = min(map(len, curves))
            panel.plot(np.mean([curve[:length] for curve in curves], 0), label=name)
        panel.set_title("guided" if row.name == ablation.DEFAULT else row.name, fontsize=9)
        panel.set_yscale("symlog", linthresh=0.1)
        panel.tick_params(labelsize=6)
        panel.legend(fontsize=6)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, a teacher each (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder (default runs/methods)")
    parser.add_argument("--split", choices=["test", "validation"], default="validation", help="real images")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default 1)")
    parser.add_argument("--record", action="store_true", help="write it to benchmarks/results too")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes: proves that it runs, no more")
    a = parser.parse_args()
    if a.record and a.rehearse:
        parser.error("a rehearsal is not recorded")
    machine = describe(resolve_device("cpu"))  # before the work: what fails here must not lose it
    made = read(a.out, a.split, a.rehearse)
    result = {**ablation.run(made, range(a.seeds), a.workers), "machine": machine}
    result["steps"] = made.job(made.rows[0], 0).variants[0].distill.distill.train.steps
    images = RESULTS if a.record else a.out
    made = replace(made, rows=tuple(row for row in made.rows if row.name in result["rows"]))
    picture(made, 0).save(images / f"{NAME}-images.png", optimize=True)
    draw_losses(made, 0, images / f"{NAME}-losses.png")
    if a.record:
        replace_text(RESULTS / f"{NAME}.json", json.dumps(result, indent=1) + "\n")
    finish(result, markdown(result))


if __name__ == "__main__":
    main()
