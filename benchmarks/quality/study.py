"""Tuning and benchmark of a scenario: which methods' images at which seconds teach students what."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.quality import sets, students
from benchmarks.quality.scenario import DATA, GUIDED, REAL, Method, Scenario
from benchmarks.quality.worlds import World, prepare
from dfkd.allocator import keep_freed_memory
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
        return REHEARSED if self.scenario.rehearsed else None

    def tune(self) -> dict[str, Any]:
        """Every trial of every method: {method: [{"settings", "accuracy", "images", "seconds"}]}, validation images."""
        asked = [method for method in self.scenario.methods if len(method.trials) > 1]
        with _workers(self.workers) as pool:
            pool.submit(prepare, self.scenario, self.data, TUNING_SEED, self.out).result()
            wanted = {
                method.named(trial): (method, trial)
                for trial in range(max(len(method.trials) for method in asked))
                for method in asked
                if trial < len(method.trials)
            }
            tried = {(name,): pool.submit(try_settings, self, *which) for name, which in wanted.items()}
            _tell(tried)
        return {
            method.name: [
                {"settings": dict(settings), **tried[(method.named(trial),)].result()}
                for trial, settings in enumerate(method.trials)
            ]
            for method in asked
        }

    def run(self, budgets: Sequence[float], seeds: Sequence[int], only: Sequence[str] = ()) -> dict[str, Any]:
        """Every method at every budget and seed. only: of these methods, with real data; () for all."""
        chosen, said = self.scenario.chosen(), {method.name: method for method in self.scenario.methods}
        asked = [name for name in said if not only or name in only]
        first = {said[name].named(chosen[name]): name for name in reversed(asked) if name not in DATA}
        made = list(first.values())  # of methods whose best settings are the same, one
        with _workers(self.workers) as pool:
            worlds = [pool.submit(prepare, self.scenario, self.data, seeds[0], self.out).result()]
            others = [pool.submit(prepare, self.scenario, self.data, seed, self.out) for seed in seeds[1:]]
            worlds += [other.result() for other in others]  # by now what all seeds share is written
            teachers = {world.teacher: world for world in worlds}
            taught = [pool.submit(accuracy_of, self, world) for world in teachers.values()]
            parts = {
                (seed, name): pool.submit(judge_method, self, said[name], chosen[name], budgets, seed)
                for seed in seeds
                for name in made
            }
            _tell(parts)
            flops = {name: pool.submit(flop_of, self, said[name], chosen[name], seeds[0]) for name in made}
            found = {key: part.result() for key, part in parts.items()}
            flop = {name: part.result() for name, part in flops.items()}
            accuracies = [part.result() for part in taught]
        for seed, name in product(seeds, asked):
            if name in DATA:  # they come with the guided images, of which there are as many
                found[seed, name] = found[seed, GUIDED][name]
            else:
                found[seed, name] = found[seed, first[said[name].named(chosen[name])]]
        methods = {}
        for name in asked:
            of_seeds = [found[seed, name] for seed in seeds]
            methods[name] = {
                "says": said[name].says,
                "settings": said[name].differs(chosen[name]),
                "flop": None if name in DATA else flop[first[said[name].named(chosen[name])]],
                **{
                    key: {f"{budget:g}": [one[f"{budget:g}"][key] for one in of_seeds] for budget in budgets}
                    for key in ("accuracy", "images", "seconds")
                },
            }
        return {
            "scenario": self.scenario.name,
            "shift": self.scenario.shift,
            "budgets": list(budgets),
            "seeds": list(seeds),
            "teacher": accuracies,
            "student": dict(self.scenario.stages["distill"]),
            "methods": methods,
        }


def try_settings(study: Study, method: Method, trial: int) -> dict[str, Any]:
    """One trial: {"accuracy", "images", "seconds"}; an accuracy of 0 where the seconds do not allow a group."""
    scenario, out = study.scenario, study.out / "tuning" / method.named(trial)
    world, seconds = prepare(scenario, study.data, TUNING_SEED, study.out), float(scenario.tuning["seconds"])
    asked = scenario.generating(method, trial, world.teacher, TUNING_SEED, out / "synthetic")
    spent = sets.make(asked, seconds)
    try:
        images, taken = sets.of_budget(spent, seconds)
    except ValueError:
        return {"accuracy": 0.0, "images": 0, "seconds": spent[0][1]}
    learning = scenario.learning(world.teacher, TUNING_SEED, out / "student", int(scenario.tuning["steps"]))
    pool = sets.open_set(out / "synthetic", images)
    judged = students.judge(learning, pool, world.data, "validation", study.limit)
    return {"accuracy": judged["accuracy"], "images": images, "seconds": taken}


def judge_method(study: Study, method: Method, trial: int, budgets: Sequence[float], seed: int) -> dict[str, Any]:
    """{budget: {"accuracy", "images", "seconds"}} of a method and seed, None for each where a group takes longer; of
    guided diffusion those of real data and of the prior's beside them."""
    scenario, world = study.scenario, prepare(study.scenario, study.data, seed, study.out)
    folder = study.out / f"seed-{seed}" / method.name
    asked = scenario.generating(method, trial, world.teacher, seed, folder / "synthetic")
    most = 2 * asked.generate.batching.group if scenario.rehearsed else sets.MOST
    spent = sets.make(asked, max(budgets), most)
    found: dict[str, Any] = {}
    for budget in budgets:
        try:
            images, taken = spent[-1] if scenario.rehearsed else sets.of_budget(spent, budget)
        except ValueError:
            found[f"{budget:g}"] = dict.fromkeys(("accuracy", "images", "seconds"))
            continue
        pool = sets.open_set(asked.out, images)
        found[f"{budget:g}"] = {"images": images, "seconds": taken} | _judged(
            study, world, method.name, pool, budget, seed
        )
    if method.name == GUIDED:
        size = pool.image_size
        for name in (other.name for other in scenario.methods if other.name in DATA):
            found[name] = {}
            for budget in budgets:
                images = found[f"{budget:g}"]["images"]
                whole = world.real(size) if name == REAL else world.prior_data(images, seed)
                some = students.some_of(whole, images, seed)
                judged = _judged(study, world, name, some, budget, seed)
                found[name][f"{budget:g}"] = {"images": images, "seconds": 0.0} | judged
    return found


def _judged(study: Study, world: World, name: str, images: Any, budget: float, seed: int) -> dict[str, Any]:
    folder = students.folder_of(study.out, seed, name, budget)
    learning = study.scenario.learning(world.teacher, seed, folder)
    return {"accuracy": students.judge(learning, images, world.data, "test", study.limit)["accuracy"]}


def accuracy_of(study: Study, world: World) -> float:
    """A teacher's accuracy on the test images."""
    return evaluate(Classifier.from_pretrained(world.teacher), world.data, limit=study.limit).accuracy


def flop_of(study: Study, method: Method, trial: int, seed: int) -> float:
    """FLOP of an image of a method."""
    world = prepare(study.scenario, study.data, seed, study.out)
    return sets.flop_of(study.scenario.generating(method, trial, world.teacher, seed, study.out / "flop"))


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
