"""The whole job, judged: what a student of guided images is worth beside every control, over several seeds.

    python -m benchmarks.quality demo --seeds 3 --out runs/quality --record benchmarks/results/quality-demo-cpu.json
    python -m benchmarks.quality ablation --seeds 3        each option off and on around the default: ablation.py

A seed is `dfkd-run benchmarks/quality_demo.toml --seed N --out OUT/seed-N`: a teacher, and for guided images and each
control a student with as many images, steps and views, tested once on real images. Stopped and started again it goes
on. Settings were tuned on the validation split alone (--split validation); the test split is for the end. The last line
of output is {"student": [by seed], "teacher": [by seed], "baselines": {name: [by seed]}, "seconds", "machine", ...}.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import ablation
from benchmarks.machine import describe
from benchmarks.recording import finish, table, taken_on
from dfkd.data import read_manifest
from dfkd.files import replace_text
from dfkd.run import Job, read_job, run_job
from dfkd.runtime import resolve_device
from dfkd.synthesis.command import quieten_libraries
from dfkd.training.folder import RESULT

ROOT = Path(__file__).parents[1]
NAMES = {
    "guided": "**guided images**",
    "unguided": "unguided samples of the prior",
    "unguided_pixels": "unguided samples, their pixels refined, about equal seconds",
    "guided_without_pixels": "guided samples, pixels not refined",
    "deepinversion": "DeepInversion, about equal seconds",
    "noise": "uniform noise",
    "prior_data": "the prior's own training data",
}
REHEARSAL: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"epochs": "none", "steps": 4},
    "generate": {"count": 20, "group": 10, "batch": 10, "shard-size": 0, "steps": 3, "refine-steps": 1},
    "distill": {"steps": 2, "batch-size": 8, "warmup": 0},
    "evaluate": {"limit": 50},
}


def read_file(name: str, split: str = "test", rehearse: bool = False) -> dict[str, Any]:
    """A file of dfkd-run, benchmarks/quality_NAME.toml, as it is judged. split: of the real images."""
    file = tomllib.loads((ROOT / "benchmarks" / f"quality_{name}.toml").read_text(encoding="utf-8"))
    for of, changes in (REHEARSAL if rehearse else {}).items():
        file[of] = {**file.get(of, {}), **changes}
    file["evaluate"] = {**file.get("evaluate", {}), "split": split}
    if rehearse:
        file["baselines"]["deepinversion"]["method"] = "deepinversion(steps=2)"
        file["baselines"]["unguided_pixels"]["refine-steps"] = 2
    return file


def judged(job: Job) -> dict[str, Any]:
    """Accuracies of one seed's run, {"student", "teacher", "baselines"}, and the seconds of its parts by name."""
    found = run_job(job, say=lambda line: print(line, file=sys.stderr, flush=True))
    seconds: dict[str, Any] = {}
    if job.teacher is not None:
        seconds["teacher"] = json.loads((job.teacher.out / RESULT).read_text())["seconds"]
    for variant in job.variants:
        images = sum(shard["seconds"] for shard in read_manifest(variant.generate.out)[1])
        student = json.loads((variant.distill.out / RESULT).read_text())["seconds"]
        seconds[variant.name or "guided"] = {"images": round(images, 1), "student": round(student, 1)}
    accuracies = {"student": found["accuracy"], "teacher": found["teacher_accuracy"], "baselines": found["baselines"]}
    return {**accuracies, "seconds": seconds}


def together(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every seed's numbers side by side."""
    names = seeds[0]["baselines"]
    return {
        "student": [seed["student"] for seed in seeds],
        "teacher": [seed["teacher"] for seed in seeds],
        "baselines": {name: [seed["baselines"][name] for seed in seeds] for name in names},
        "seconds": [seed["seconds"] for seed in seeds],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Accuracies on real images: mean and every seed, the best first, and seconds of the images."""
    students = {"guided": result["student"], **result["baselines"]}
    ranked = sorted(students, key=lambda name: -sum(students[name]))
    rows = [(NAMES.get(name, name), students[name], _seconds(result, name)) for name in ranked]
    cells = [[name, _mean(values), _every(values), spent] for name, values, spent in rows]
    cells.append(["(the teacher itself)", _mean(result["teacher"]), _every(result["teacher"]), None])
    under = (
        f"{result['images']} images and {result['steps']} distillation steps each, real images of the {result['split']}"
        " split. "
    )
    lines = table(["student distilled on", "accuracy", "seeds", "s for the images"], cells)
    return "\n".join([*lines, "", under + taken_on(result["machine"], "python -m benchmarks.quality demo")])


def _mean(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} %"


def _every(values: Sequence[float]) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values)


def _seconds(result: Mapping[str, Any], name: str) -> str | None:
    spent = [seed[name]["images"] for seed in result["seconds"] if name in seed]
    return f"{median(spent):.0f}" if spent else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["demo", "ablation"], help="benchmarks/quality_demo.toml, or ablation.toml")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder (default runs/quality, runs/ablation)")
    parser.add_argument("--split", choices=["test", "validation"], help="real images (default test, validation)")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="ablation: of these rows alone")
    parser.add_argument("--workers", type=int, default=2, help="ablation: processes of one thread each (default 2)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write the JSON to this file")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, seconds: proves that it runs, no more")
    a = parser.parse_args()
    if a.record and a.rehearse:
        parser.error("a rehearsal is not recorded")
    quieten_libraries()
    machine = describe(resolve_device("auto"))  # before the work: what fails here must not lose it
    seeds, out = range(a.first_seed, a.first_seed + a.seeds), a.out or Path("runs", a.job.replace("demo", "quality"))
    if a.job == "ablation":
        asked = ablation.Ablation.read(out, a.split or "validation", a.rows, a.rehearse)
        result = {**ablation.run(asked, seeds, a.workers), "machine": machine}
        text = ablation.markdown(result)
    else:
        split = a.split or "test"
        file = read_file(a.job, split, a.rehearse)
        jobs = [read_job(file, out / f"seed-{seed}", seed) for seed in seeds]
        own = jobs[0].variants[0]
        sizes = {"images": own.generate.count, "steps": own.distill.distill.train.steps}
        result = {**together([judged(job) for job in jobs]), "machine": machine, "split": split, **sizes}
        text = markdown(result)
    if a.record:
        replace_text(a.record, json.dumps(result, indent=1) + "\n")
    finish(result, text)


if __name__ == "__main__":
    main()
