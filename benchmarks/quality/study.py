"""Tuning and benchmark of a scenario: which methods' images at which seconds teach students what."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.quality import sets, students
from benchmarks.quality.scenario import DATA, GUIDED, REAL, Method, Scenario
from benchmarks.quality.worlds import World, prepare
from dfkd.allocator import keep_freed_memory
from dfkd.config import DistillCommand, GenerateCommand
from dfkd.data import Images, open_folder
from dfkd.evaluation import evaluate
from dfkd.synthesis.command import quieten_libraries
from dfkd.teachers import Classifier

TUNING_SEED = 1000  # of trials, which no seed of the benchmark repeats
REHEARSED = 50  # real images of a rehearsal's test


@dataclass(frozen=True)
class Study:
    """out: the folder, in which a study that was stopped goes on. data: CIFAR-10 by name. workers: processes."""

    scenario: Scenario
    data: str | None
    out: Path
    workers: int = 2

    @property
    def limit(self) -> int | None:
        """Real images of a test, at most."""
        return REHEARSED if self.scenario.rehearsed else None

    def most(self, asked: GenerateCommand, learning: DistillCommand) -> int:
        """Images of a set at most: two groups of a rehearsal, else as many as a student's steps can see."""
        train = learning.distill.train
        return 2 * asked.generate.batching.group if self.scenario.rehearsed else int(train.steps) * train.batch_size

    def tune(self) -> dict[str, Any]:
        """Every trial of every method: {method: [{"settings", "accuracy", "images", "seconds"}]}, validation images."""
        asked = [method for method in self.scenario.methods if len(method.trials) > 1]
        every = [(method, trial) for method in asked for trial in range(len(method.trials))]
        wanted = {(self.scenario.named(*pair),): pair for pair in every}  # what several methods try is made once
        with _workers(self.workers) as pool:
            world = self._worlds(pool, [TUNING_SEED])[TUNING_SEED]
            tried = {name: pool.submit(try_settings, self, world, *pair) for name, pair in wanted.items()}
            _tell(tried)
        found = {name: one.result() for name, one in tried.items()}
        return {
            method.name: [
                {"settings": dict(settings), **found[(self.scenario.named(method, trial),)]}
                for trial, settings in enumerate(method.trials)
            ]
            for method in asked
        }

    def run(self, budgets: Sequence[float], seeds: Sequence[int], only: Sequence[str] = ()) -> dict[str, Any]:
        """Every method at every budget and seed. only: of these methods, guided among them; () for all."""
        chosen = self.scenario.chosen()
        methods = {method.name: method for method in self.scenario.methods if not only or method.name in only}
        made = {name: method for name, method in methods.items() if name not in DATA}
        named = {name: self.scenario.named(method, chosen[name]) for name, method in made.items()}
        first = {named[name]: name for name in reversed(made)}  # of methods of the same settings, the first
        own = {name: first[named[name]] for name in made}
        with _workers(self.workers) as pool:
            worlds = self._worlds(pool, seeds)
            taught = [pool.submit(accuracy_of, self, world) for world in dict.fromkeys(worlds.values())]
            parts = {
                (seed, name): pool.submit(judge_method, self, worlds[seed], made[name], chosen[name], budgets, seed)
                for seed in seeds
                for name in first.values()
            }
            flops = {
                name: pool.submit(flop_of, self, worlds[seeds[0]], made[name], chosen[name]) for name in first.values()
            }
            _tell(parts)
            found = {key: part.result() for key, part in parts.items()}
            flop = {name: part.result() for name, part in flops.items()}
            accuracies = [part.result() for part in taught]

        def told(seed: int, name: str, budget: float) -> Mapping[str, Any]:
            of: Mapping[str, Any] = found[seed, GUIDED][name] if name in DATA else found[seed, own[name]]
            return of[f"{budget:g}"]  # type: ignore[no-any-return]

        return {
            "scenario": self.scenario.name,
            "shift": self.scenario.shift,
            "budgets": list(budgets),
            "seeds": list(seeds),
            "teacher": accuracies,
            "student": dict(self.scenario.stages["distill"]),
            "methods": {
                name: {
                    "says": method.says,
                    "settings": method.differs(chosen[name]),
                    "flop": None if name in DATA else flop[own[name]],
                    **{
                        key: {f"{budget:g}": [told(seed, name, budget)[key] for seed in seeds] for budget in budgets}
                        for key in ("accuracy", "images", "seconds")
                    },
                }
                for name, method in methods.items()
            },
        }

    def _worlds(self, pool: ProcessPoolExecutor, seeds: Sequence[int]) -> dict[int, World]:
        """The world of each seed: the first one's before the others', which may share its images and its teacher."""
        asked = [(self.scenario, self.data, seed, self.out) for seed in seeds]
        first = pool.submit(prepare, *asked[0]).result()
        others = asked[1:] if self.scenario.teacher_a_seed else []
        made = [pool.submit(prepare, *one) for one in others]
        return dict.fromkeys(seeds, first) | {one[2]: other.result() for one, other in zip(others, made, strict=True)}


def try_settings(study: Study, world: World, method: Method, trial: int) -> dict[str, Any]:
    """One trial: {"accuracy", "images", "seconds"}; an accuracy of 0 where the seconds do not allow a group."""
    scenario = study.scenario
    seconds, steps = float(scenario.tuning["seconds"]), int(scenario.tuning["steps"])
    out = study.out / "tuning" / scenario.named(method, trial)
    learning = scenario.learning(world.teacher, TUNING_SEED, out / f"student-{seconds:g}s-{steps}", steps)
    asked = scenario.generating(method, trial, world.teacher, TUNING_SEED, out / "synthetic")
    spent = sets.make(asked, seconds, study.most(asked, learning))
    try:
        images, taken = sets.of_budget(spent, seconds)
    except ValueError:
        return {"accuracy": 0.0, "images": 0, "seconds": spent[0][1]}
    pool = open_folder(asked.out, until=images)
    accuracy = students.judge(learning, pool, world.data, "validation", study.limit)
    return {"accuracy": accuracy, "images": images, "seconds": taken}


def judge_method(
    study: Study, world: World, method: Method, trial: int, budgets: Sequence[float], seed: int
) -> dict[str, Any]:
    """{budget: {"accuracy", "images", "seconds"}} of a method and seed, None for each where a group takes longer; of
    guided diffusion those of real data and of the prior's beside them, {name: {budget: ...}}."""
    scenario, own = study.scenario, study.out / f"seed-{seed}"
    folder = own / scenario.named(method, trial)
    asked = scenario.generating(method, trial, world.teacher, seed, folder / "synthetic")
    spent = sets.make(asked, max(budgets), study.most(asked, scenario.learning(world.teacher, seed, folder)))

    def judged(images: Images, where: Path, seconds: float) -> dict[str, Any]:
        learning = scenario.learning(world.teacher, seed, where)
        accuracy = students.judge(learning, images, world.data, "test", study.limit)
        return {"accuracy": accuracy, "images": len(images.labels), "seconds": seconds}

    beside = [name for name in DATA if method.name == GUIDED]
    found: dict[str, Any] = {name: {} for name in beside}
    for budget in budgets:
        at, student = f"{budget:g}", f"student-{budget:g}s"
        try:
            images, taken = spent[-1] if scenario.rehearsed else sets.of_budget(spent, budget)
        except ValueError:
            for part in (found, *(found[name] for name in beside)):
                part[at] = dict.fromkeys(("accuracy", "images", "seconds"))
            continue
        pool = open_folder(asked.out, until=images)
        found[at] = judged(pool, folder / student, taken)
        for name in beside:
            whole = world.real(pool.image_size) if name == REAL else world.prior_data(images, seed)
            some = students.some_of(whole, images, seed)
            found[name][at] = judged(some, own / f"{name}-{images}", 0.0)
    return found


def accuracy_of(study: Study, world: World) -> float:
    """A teacher's accuracy on the test images."""
    return evaluate(Classifier.from_pretrained(world.teacher), world.data, limit=study.limit).accuracy


def flop_of(study: Study, world: World, method: Method, trial: int) -> float:
    """FLOP of an image of a method."""
    return sets.flop_of(study.scenario.generating(method, trial, world.teacher, 0, study.out / "flop"))


@contextmanager
def _workers(count: int) -> Any:
    """Processes of one thread each: a core second is then one of one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(count, get_context("spawn"), _begin) as pool:
        yield pool


def _begin() -> None:
    """What a command does as it starts."""
    quieten_libraries()
    keep_freed_memory()


def _tell(parts: Mapping[tuple[Any, ...], Future[Any]]) -> None:
    """Say on stderr what is done, as it is; raises what a part has raised, once the others that run are done."""
    names = {part: key for key, part in parts.items()}
    for number, part in enumerate(as_completed(names), 1):
        key = " ".join(map(str, names[part]))
        print(f"{number}/{len(parts)} {key}: {json.dumps(part.result())}", file=sys.stderr, flush=True)
