"""The documents' tables from the recorded results: `python -m benchmarks.tables` writes them, --check only compares.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; no number in it is typed by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cost_model import markdown as cost_table
from benchmarks.guidance_paths import markdown as guidance_table
from benchmarks.msarc import markdown as msarc_table
from benchmarks.quantised_unet import markdown as quantised_table
from benchmarks.suite.table import markdown as suite_table
from benchmarks.waterfall_table import document as waterfall_table
from benchmarks.waterfall_table import sentence as waterfall_sentence

from benchmarks.bench_distill import markdown as distill_table
from benchmarks.bench_engines import markdown as engines_table
from benchmarks.bench_loader import markdown as loader_table
from benchmarks.sd15_engines import markdown as sd15_engines_table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "prior_data": "the prior's own training data",
    "unguided": "unguided samples of the prior",
    "unguided_sharpened": "unguided samples, sharpened without a teacher",
    "deepinversion": "DeepInversion, equal seconds",
    "noise": "uniform noise",
}


def quality_table(result: dict[str, Any]) -> str:
    """Accuracies on the test images, mean and range over the seeds."""
    lines = ["| student distilled on | test accuracy | seeds |", "|---|---|---|"]

    def row(name: str, seeds: list[float]) -> str:
        spread = " ".join(f"{100 * value:.1f}" for value in seeds)
        return f"| {name} | {100 * sum(seeds) / len(seeds):.1f} % | {spread} |"

    lines.append(row("**guided images**", result["student_accuracy_seeds"]))
    ranked = sorted(result["baselines_seeds"].items(), key=lambda item: -sum(item[1]))
    lines += [row(NAMES.get(name, name), seeds) for name, seeds in ranked]
    lines.append(row("(the teacher itself)", result["teacher_accuracy_seeds"]))
    steps = result["preset"]["distill"]["steps"]
    machine = result["machine"]
    lines += [
        "",
        f"{result['images']} images and {steps} distillation steps each; {machine['device']}, {machine['threads']} "
        f"threads, torch {machine['versions']['torch']}, {machine['date']}: `python -m benchmarks.quality demo`.",
    ]
    return "\n".join(lines)


def largest_engines_table(result: dict[str, Any]) -> str:
    """The engines at the largest micro-batch; the others stay in the recorded file."""
    rows = [row for row in result["rows"] if row["rows"] == result["planned_rows"]]
    return engines_table(result | {"rows": rows})


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo-table": ("quality-demo-cpu.json", quality_table),
    "distill-table": ("distill-cpu.json", distill_table),
    "guidance-table": ("guidance_paths-cpu.json", guidance_table),
    "engines-table": ("engines-cpu.json", largest_engines_table),
    "sd15-engines-table": ("sd15-engines-cpu.json", sd15_engines_table),
    "loader-table": ("loader-cpu.json", loader_table),
    "msarc-table": ("msarc-cpu.json", msarc_table),
    "quantised-table": ("quantised-unet-cpu.json", quantised_table),
    "cost-table": ("cost-model-cpu.json", cost_table),
    "suite-table": ("suite-cpu.json", suite_table),
    "waterfall-sentence": ("waterfall-cpu.json", waterfall_sentence),
    "waterfall-table": ("waterfall-cpu.json", waterfall_table),
}
README = "README.md"
ELSEWHERE = {
    "cost-table": "docs/cost.md",
    "sd15-engines-table": "docs/tensorrt.md",
    "suite-table": "docs/benchmarks.md",
    "waterfall-table": "docs/waterfall.md",
}
DOCUMENTS = (README, *sorted({*ELSEWHERE.values()}))


def filled(text: str, document: str = README) -> str:
    """A document's text with every table replaced by what the results say; one that is not recorded is left out.

    Raises ValueError: a marker is missing, or a table stands there without a result.
    """
    for name, (file, render) in TABLES.items():
        if ELSEWHERE.get(name, README) != document:
            continue
        pattern = re.compile(f"<!-- {name} -->(.*?)<!-- /{name} -->", re.DOTALL)
        there = pattern.search(text)
        if not (RESULTS / file).exists():
            if there and there[1].strip():
                raise ValueError(f"{document} has a table {name}, and {RESULTS / file} is not recorded")
            continue
        table = render(json.loads((RESULTS / file).read_text()))
        if not there:
            raise ValueError(f"{document} has no <!-- {name} --> ... <!-- /{name} -->")
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where one is not current")
    check = parser.parse_args().check
    for document in DOCUMENTS:
        before = (ROOT / document).read_text()
        after = filled(before, document)
        if check and after != before:
            sys.exit(f"{document} is not current: run python -m benchmarks.tables")
        (ROOT / document).write_text(after)


if __name__ == "__main__":
    main()
