"""The ablation: each option of the method off or on around the default, with equal seconds of synthesis.

    python -m benchmarks.quality ablation --seeds 3 --record benchmarks/results/ablation-demo-cpu.json

benchmarks/ablation.toml names a default and its rows, each by what differs from it. A row makes as many images as take
the seconds of the default's: core seconds of one process with one thread, in which networks are opened, words learned,
lengths tried and students refreshed. Its student has the default's steps and views, unless the row is about these.
Students are judged on validation images, since defaults are chosen by this table; the test images stay for the end.
Stopped and started again it goes on.
"""

import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.recording import table, taken_on
from dfkd.config import read_preset, section
from dfkd.data import open_folder
from dfkd.evaluation import evaluate
from dfkd.evaluation.paired import over_seeds
from dfkd.files import replace_text
from dfkd.job import Job, read_job
from dfkd.rounds import make_images
from dfkd.synthesis import command as synthesis
from dfkd.synthesis.command import quieten_libraries
from dfkd.teachers import load_teacher
from dfkd.training.distill import distill
from dfkd.training.teacher import train_teacher

FILE = Path(__file__).with_name("ablation.toml")
DEFAULT = "default"
REHEARSAL: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"epochs": "none", "steps": 4},
    "generate": {"count": 8, "group": 4, "batch": 4, "steps": 3, "refine-steps": 1},
    "distill": {"steps": 2, "batch-size": 8, "warmup": 0},
    "evaluate": {"limit": 50},
}


@dataclass(frozen=True)
class Row:
    """A line of the table. says: in words. differs: from the default, by section of a run's file."""

    name: str
    says: str
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """default: sections of a run's file. rows: the default first. split: of the real images."""

    default: Mapping[str, Any]
    rows: tuple[Row, ...]
    out: Path
    split: str = "validation"

    @classmethod
    def read(cls, out: Path, split: str = "validation", only: Sequence[str] = (), rehearse: bool = False) -> "Ablation":
        """The rows of FILE, or those named `only`, and the default. Raises ValueError: there is no such row."""
        file = tomllib.loads(FILE.read_text(encoding="utf-8"))
        preset = read_preset(file.pop("preset"))
        parts = ("teacher", "generate", "distill", "evaluate")  # its baselines are no rows
        file = {**file, **{part: {**section(preset, part), **section(file, part)} for part in parts}}
        rows = {name: Row(name, row.pop("says"), row) for name, row in file.pop("rows").items()}
        if unknown := [name for name in only if name not in rows]:
            raise ValueError(f"{FILE.name} has no row {unknown[0]!r}; it has {', '.join(rows)}")
        for part, changes in (REHEARSAL if rehearse else {}).items():
            file[part] = {**file.get(part, {}), **changes}
        file["evaluate"] = {**file.get("evaluate", {}), "split": split}
        asked = [row for name, row in rows.items() if not only or name in only]
        return cls(file, (Row(DEFAULT, "the default"), *asked), out, split)

    def job(self, row: Row, seed: int, count: int | None = None, out: Path | None = None) -> Job:
        """A row's run on the seed's own teacher. count: of images; None: the default's. out: None: its own folder."""
        sections = {name: dict(part) if isinstance(part, dict) else part for name, part in self.default.items()}
        for name, differs in row.differs.items():
            sections[name] = {**sections.get(name, {}), **differs}
        if count is not None:
            sections["generate"]["count"] = count
        sections["teacher"] = {"checkpoint": str(self.out / f"seed-{seed}" / "teacher")}
        return read_job(sections, out or self.out / f"seed-{seed}" / row.name, seed)


def teach(ablation: Ablation, seed: int) -> None:
    """Train a seed's teacher, unless it is there."""
    asked = read_job(ablation.default, ablation.out / f"seed-{seed}", seed).teacher
    assert asked is not None
    train_teacher(asked.data, asked.training, asked.out, architecture=asked.architecture)


def calibrate(ablation: Ablation, row: Row, budget: float | None) -> dict[str, Any]:
    """{"count", "seconds"}: the images of a row that take `budget` core seconds; None: the default's own count.

    Two calls of one and of three groups tell what a group takes and what comes before it. Raises ValueError: the budget
    is too small for one group.
    """
    kept = ablation.out / "counts" / f"{row.name}.json"
    if not kept.exists():
        own = ablation.job(row, 0, out=kept.with_suffix(""))
        asked = own.variants[0].generate
        group = asked.generate.batching.group * (1 + asked.generate.sampling.keep_intermediates)
        group *= 1 if own.rounds is None else own.rounds.phases
        found = [_spent(ablation.job(row, 0, groups * group, own.out)) for groups in (1, 3)]
        each = (found[1] - found[0]) / 2
        before = found[0] - each
        groups = asked.count // group if budget is None else int((budget - before) / each)
        if groups < 1:
            raise ValueError(f"{row.name}: a group of {group} takes {before + each:.0f} s of {budget:.0f}")
        replace_text(kept, json.dumps({"count": groups * group, "seconds": round(before + groups * each, 2)}))
    known: dict[str, Any] = json.loads(kept.read_text())
    return known


def judge(ablation: Ablation, row: Row, seed: int, count: int) -> dict[str, Any]:
    """{"accuracy", "agreement", "images", "seconds", "student_seconds"} of a row's student; kept in its folder."""
    kept = ablation.out / f"seed-{seed}" / row.name / "judged.json"
    if not kept.exists():
        job = ablation.job(row, seed, count)
        asked, learning = job.variants[0].generate, job.variants[0].distill
        shutil.rmtree(job.out, ignore_errors=True)  # of a run that was stopped: its seconds are not known
        seconds = _write(job)
        begun, teacher = time.process_time(), load_teacher(job.classifier)
        student = distill(open_folder(asked.out), teacher, learning.distill, learning.out)
        spent = time.process_time() - begun
        assert job.evaluate is not None
        test = evaluate(student, job.evaluate.data, teacher, ablation.split, job.evaluate.limit)
        found = {"accuracy": test.accuracy, "agreement": test.agreement, "teacher_accuracy": test.teacher_accuracy}
        found |= {"images": count, "seconds": round(seconds, 2), "student_seconds": round(spent, 2)}
        replace_text(kept, json.dumps(found))
    known: dict[str, Any] = json.loads(kept.read_text())
    return known


def _write(job: Job) -> float:
    """Make a run's images; core seconds of this process for it, networks opened and students refreshed included."""
    begun, asked = time.process_time(), job.variants[0].generate
    if job.rounds is not None:
        make_images(job.rounds, asked, load_teacher(job.classifier), _silent, _silent)
    else:
        synthesis.run(asked, _silent)
    return time.process_time() - begun


def _spent(job: Job) -> float:
    """Core seconds of a run's images, which are thrown away."""
    shutil.rmtree(job.out, ignore_errors=True)
    seconds = _write(job)
    shutil.rmtree(job.out)
    return seconds


def _silent(*told: object) -> None:
    pass


def run(ablation: Ablation, seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """{"rows": {name: {"says", "accuracy": [by seed], "images", "seconds": [by seed], ...}}, "failed": {name: why}}."""
    quieten_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: a core second is then one of one core
    found: dict[str, Any] = {row.name: {"says": row.says, "differs": row.differs} for row in ablation.rows}
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), quieten_libraries) as pool:
        for done in [pool.submit(teach, ablation, seed) for seed in {0, *seeds}]:
            done.result()
        default = pool.submit(calibrate, ablation, ablation.rows[0], None).result()
        counts = {row.name: pool.submit(calibrate, ablation, row, default["seconds"]) for row in ablation.rows}
        for name, count in counts.items():
            if (error := count.exception()) is not None:
                failed[name] = f"{error}"
        rows = [row for row in ablation.rows if row.name not in failed]
        students = {
            (row.name, seed): pool.submit(judge, ablation, row, seed, counts[row.name].result()["count"])
            for seed, row in product(seeds, rows)
        }
        for number, ((name, seed), student) in enumerate(students.items(), 1):
            print(f"{number}/{len(students)} seed {seed} {name}: {student.result()}", file=sys.stderr, flush=True)
    for row in rows:
        of_seeds = [students[row.name, seed].result() for seed in seeds]
        found[row.name] |= {key: [one[key] for one in of_seeds] for key in of_seeds[0]}
    return {"rows": {row.name: found[row.name] for row in rows}, "failed": failed, "split": ablation.split}


def difference(values: Sequence[float], default: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences of pairs, and half of its 95 % interval by Student's t; of one pair it is infinite."""
    found = over_seeds(values, default)
    return found.value, found.high - found.value


def markdown(result: Mapping[str, Any]) -> str:
    """The default, then its rows in the file's order: images, core seconds, accuracy, difference to the default."""
    rows, default = result["rows"], result["rows"][DEFAULT]["accuracy"]
    cells = []
    for name, row in rows.items():
        every = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        middle, half = difference(row["accuracy"], default)
        apart = None if name == DEFAULT else f"{100 * middle:+.1f} ± {100 * half:.1f}"
        seconds = sum(row["seconds"]) / len(row["seconds"])
        mean = 100 * sum(row["accuracy"]) / len(default)
        cells.append([row["says"], row["images"][0], f"{seconds:.0f}", f"{mean:.1f}", every, apart])
    heads = ["around the default", "images", "core s", "accuracy %", "seeds", "points, 95 % interval"]
    under = (
        f"Real images of the {result['split']} split. Interval: Student's t of the {len(default)} differences to the"
        " default of the same seed, teacher included. "
    )
    lines = [*table(heads, cells), "", under + taken_on(result["machine"], "python -m benchmarks.quality ablation")]
    return "\n".join([*lines, *(f"\nNot judged: {name}: {why}" for name, why in result["failed"].items())])
