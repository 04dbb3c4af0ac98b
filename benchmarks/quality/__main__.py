"""What students learn from guided diffusion's images and from every control's, at equal seconds, over several seeds.

    python -m benchmarks.quality cifar10 --data parquet:DATA --budgets 30,60,120,300 --seeds 5 --record
    python -m benchmarks.quality cifar10 --data parquet:DATA --shift sketch --seeds 5      the teacher has seen sketches
    python -m benchmarks.quality demo --seeds 5
    python -m benchmarks.quality cifar10 --data parquet:DATA --tune --record               every trial of every method
    python -m benchmarks.quality ablation --seeds 3            each option off and on around the demo: ablation.py

A scenario is benchmarks/quality/SCENARIO.toml. All methods have the same teacher, the same seconds for their images,
and the same student, steps and views; each has as many trials of its settings as any other, judged on validation images
(--tune), and the best stands for it. The test images are asked once for each student. Stopped and started again it goes
on. The last line of output is JSON: {"budgets", "methods": {name: {"accuracy": {budget: [one a seed]}, ...}}, ...}.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from benchmarks import ablation
from benchmarks.machine import describe
from benchmarks.quality import tables
from benchmarks.quality.scenario import GUIDED, Scenario
from benchmarks.quality.study import Study
from benchmarks.quality.worlds import SHIFTS, pretended
from benchmarks.recording import finish
from dfkd.errors import UsageError
from dfkd.files import replace_text
from dfkd.runtime import resolve_device
from dfkd.synthesis.command import quieten_libraries

BUDGETS = (30.0, 60.0, 120.0, 300.0)  # seconds


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__, formatter_class=form)
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    for name in (*SHIFTS, "ablation"):
        _add_options(scenarios.add_parser(name, description=__doc__, formatter_class=form), name)
    a = parser.parse_args()
    if a.record and a.rehearse:
        parser.error("a rehearsal is not recorded")
    shift = getattr(a, "shift", "none")
    out = a.out or Path("runs", f"quality-{a.scenario}{'' if shift == 'none' else '-' + shift}")
    quieten_libraries()
    machine = describe(resolve_device("cpu"))  # before the work: what fails here must not lose it
    if a.scenario == "ablation":
        rows = ablation.Ablation.read(out, a.split, a.rows, a.rehearse)
        result = {**ablation.run(rows, _seeds(a), a.workers), "machine": machine}
        finish(result, ablation.markdown(result), "ablation-demo" if a.record else "")
        return
    scenario, data = Scenario.read(a.scenario, shift, a.rehearse), getattr(a, "data", None)
    known = [method.name for method in scenario.methods]
    if unknown := [name for name in a.methods if name not in known]:
        parser.error(f"--methods: there is no {unknown[0]!r}; there are {', '.join(known)}")
    if a.methods and GUIDED not in a.methods:
        parser.error(f"--methods: the others are set beside {GUIDED}, so name it too")
    if a.tune and (a.budgets or a.seeds is not None or a.first_seed or a.methods):
        parser.error("--tune has seconds, steps and a seed of its own, and tries every method")
    if a.scenario == "cifar10" and data is None:
        if not a.rehearse:
            parser.error("cifar10 needs --data: cifar:PATH (torchvision's files), parquet:PATH or class folders")
        data = pretended(out / "pretended")
    study = Study(scenario, data, out, a.workers)
    try:
        if a.tune:
            result = {"command": _command(), "machine": machine, "tuning": scenario.tuning, "methods": study.tune()}
            text, file = json.dumps(result["methods"], indent=1), scenario.tried
        else:
            found = study.run(a.budgets or BUDGETS, _seeds(a), a.methods)
            result = {**found, "command": _command(), "machine": machine}
            text, file = tables.markdown(result), scenario.record
    except UsageError as error:
        parser.error(str(error))
    if a.record:
        replace_text(file, json.dumps(result, indent=1) + "\n")
        if not a.tune:
            tables.draw(result, file.with_suffix(".png"))
    finish(result, text)


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--seeds", type=int, help=f"repetitions (default {3 if name == 'ablation' else 5})")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder (default runs/quality-SCENARIO-SHIFT)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--record", action="store_true", help="write it to benchmarks/results too")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, a minute: proves that it runs, no more")
    if name == "ablation":
        parser.add_argument("--rows", type=_words, default=[], help="of these rows alone")
        parser.add_argument("--split", default="validation", choices=["test", "validation"], help="real images")
        return
    parser.add_argument("--budgets", type=_numbers, help="seconds (default 30,60,120,300)")
    parser.add_argument("--methods", type=_words, default=[], help="of these methods alone, guided among them")
    parser.add_argument("--tune", action="store_true", help="try every method's settings on validation images instead")
    if name == "cifar10":
        parser.add_argument("--data", help="CIFAR-10, such as cifar:PATH or parquet:PATH")
        parser.add_argument("--shift", default="none", choices=SHIFTS[name], help="of the teacher's images (none)")


def _seeds(a: argparse.Namespace) -> range:
    count = a.seeds if a.seeds is not None else 3 if a.scenario == "ablation" else 5
    return range(a.first_seed, a.first_seed + count)


def _command() -> str:
    """The arguments of this process, without its folders."""
    words, places = sys.argv[1:], {"--data": "DATA", "--out": "OUT"}
    return shlex.join(places.get(before, word) for before, word in zip(["", *words], words, strict=False))


def _numbers(text: str) -> list[float]:
    return sorted(float(word) for word in text.split(","))


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
