"""A scenario: the file that names a world, its student, and every method with the settings that were tried for it."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS
from dfkd.config import DistillCommand, GenerateCommand, TrainTeacherCommand, merged, read_preset, section
from dfkd.errors import UsageError

HERE = Path(__file__).parent
GUIDED = "guided"
REAL = "real_data"
DATA = (REAL, "prior_data")  # which take no synthesis: as many images as the guided ones of the same seconds
STAGES = ("teacher", "generate", "distill")
REHEARSAL: Mapping[str, Mapping[str, Any]] = {
    "teacher": {"epochs": None, "steps": 4, "batch_size": 8},
    "generate": {"group": 20, "batch": 20, "steps": 3},
    "distill": {"steps": 2, "batch_size": 8, "warmup": 0},
}


@dataclass(frozen=True)
class Method:
    """A way to make images. says: in words. settings: what differs from [generate]. trials: of its settings, the ones
    that were tried, each by what differs once more; the best on validation images stands."""

    name: str
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Mapping[str, Any], ...] = ({},)

    def differs(self, trial: int) -> dict[str, Any]:
        """What a trial differs in from [generate]."""
        return {**self.settings, **self.trials[trial]}


@dataclass(frozen=True)
class Scenario:
    """name: of the file. shift: between the teacher's world and the prior's. stages: sections of dfkd-run, by stage.

    methods: guided diffusion first. tuning: the seconds of a trial, and the steps of its student. rehearsed: tiny
    sizes, which prove that it runs and no more.
    """

    name: str
    shift: str
    stages: Mapping[str, Mapping[str, Any]]
    methods: tuple[Method, ...]
    tuning: Mapping[str, Any]
    rehearsed: bool = False

    @classmethod
    def read(cls, name: str, shift: str = "none", rehearse: bool = False) -> "Scenario":
        """The file of a scenario on the preset that it names."""
        file = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
        preset = read_preset(file["preset"])
        stages = {stage: {**section(preset, stage), **section(file, stage)} for stage in STAGES}
        methods = []
        for key, content in file["methods"].items():
            tried = content.get("shifted-trials" if shift != "none" else "trials") or content.get("trials", [{}])
            trials = tuple(section({"": trial}, "") for trial in tried)
            methods.append(Method(key, content["says"], section(content, "generate"), trials))
        if rehearse:
            stages = {stage: {**settings, **REHEARSAL[stage]} for stage, settings in stages.items()}
            methods = [replace(method, **_shortened(method)) for method in methods]
            file["tuning"] = {"seconds": 1e9, "steps": stages["distill"]["steps"]}
        return cls(name, shift, stages, tuple(methods), file["tuning"], rehearse)

    @property
    def teacher_a_seed(self) -> bool:
        """Whether each seed has a teacher of its own, which takes seconds in the demo and an hour on CIFAR-10."""
        return self.name == "demo"

    @property
    def record(self) -> Path:
        """The file that its benchmark is recorded in."""
        return RESULTS / f"quality-{self.name}{'' if self.shift == 'none' else f'-{self.shift}'}.json"

    @property
    def tried(self) -> Path:
        """The file that its trials are recorded in."""
        return self.record.with_name(f"{self.record.stem}-tuning.json")

    def named(self, method: Method, trial: int) -> str:
        """A folder's name that two trials, of any methods, share if they are the same settings."""
        text = json.dumps({**self.stages["generate"], **method.differs(trial)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def chosen(self) -> dict[str, int]:
        """The number of each method's best trial on record; the first where there is but one. Raises UsageError: the
        trials on record are not those of the file."""
        found = {method.name: 0 for method in self.methods}
        if self.rehearsed:
            return found
        known = json.loads(self.tried.read_text())["methods"] if self.tried.exists() else {}
        for method in self.methods:
            if len(method.trials) == 1:
                continue
            rows = known.get(method.name, [])
            if [row["settings"] for row in rows] != [dict(trial) for trial in method.trials]:
                why = f"{self.tried.name} {'has others' if rows else 'has none'}"
                raise UsageError(
                    f"the trials of {method.name} are not on record", why, "run with --tune --record first"
                )
            found[method.name] = max(range(len(rows)), key=lambda number: rows[number]["accuracy"])
        return found

    def generating(self, method: Method, trial: int, teacher: Path, seed: int, out: Path) -> GenerateCommand:
        """The settings of a method's images."""
        fixed = {
            "teacher": None,
            "teacher_checkpoint": teacher,
            "seed": seed,
            "out": out,
            "classes": (),
            "shard_size": 0,
        }
        layers = (self.stages["generate"], method.differs(trial), fixed)
        return GenerateCommand.of(**merged(GenerateCommand, *layers))

    def learning(self, teacher: Path, seed: int, out: Path, steps: int | None = None) -> DistillCommand:
        """The settings of a student. steps: None for the scenario's own."""
        fixed = {"teacher": None, "teacher_checkpoint": teacher, "seed": seed, "out": out, "data": (), "classes": ()}
        layers = [self.stages["distill"], fixed, *([{"steps": steps}] if steps else [])]
        return DistillCommand.of(**merged(DistillCommand, *layers))

    def teaching(self, data: str, seed: int, out: Path) -> TrainTeacherCommand:
        """The settings of a teacher's training on real images."""
        fixed = {"data": data, "seed": seed, "out": out}
        return TrainTeacherCommand.of(**merged(TrainTeacherCommand, self.stages["teacher"], fixed))


def _shortened(method: Method) -> dict[str, Any]:
    """A method's settings in two steps, by the first of its trials."""
    found = {**method.settings, **method.trials[0]}
    name = str(found.get("method", "")).partition("(")[0]
    if name in ("deepinversion", "fast"):
        found["method"] = f"{name}(steps=2{', width=4' if name == 'fast' else ''})"
    if found.get("refine_steps"):
        found["refine_steps"] = 1
    return {"settings": found, "trials": ({},)}
