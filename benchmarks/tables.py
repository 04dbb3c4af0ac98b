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

from benchmarks import ablation, cost, driver, methods, priors, sd15_engines
from benchmarks.quality import tables as quality
from benchmarks.recording import RESULTS

ROOT = Path(__file__).parents[1]


def largest_calls(result: dict[str, Any]) -> str:
    """The engines at the largest size of a call, which comes last; the others stay in the recorded file."""
    size = result["rows"][-1]["group"].partition(", ")[2]
    return driver.markdown(result | {"rows": [row for row in result["rows"] if row["group"].endswith(f", {size}")]})


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {  # by marker: document, result, what writes it
    "cifar10-table": ("README.md", "quality-cifar10.json", quality.markdown),
    "cifar10-sketch-table": ("docs/benchmarks.md", "quality-cifar10-sketch.json", quality.markdown),
    "demo-table": ("docs/benchmarks.md", "quality-demo.json", quality.markdown),
    "engines-table": ("docs/engines.md", "engines-cpu.json", largest_calls),
    "sd15-engines-table": ("docs/engines.md", "sd15-engines-cpu.json", sd15_engines.markdown),
    "suite-table": ("docs/benchmarks.md", "suite-cpu.json", driver.markdown),
    "sampling-table": ("docs/benchmarks.md", "sampling-demo-cpu.json", driver.markdown),
    "ablation-table": ("docs/benchmarks.md", "ablation-demo-cpu.json", ablation.markdown),
    "distill-table": ("docs/benchmarks.md", "distill-cpu.json", driver.markdown),
    "methods-table": ("docs/methods.md", "methods-demo-cpu.json", methods.markdown),
    "priors-kinds": ("docs/priors.md", "priors-cpu.json", priors.kinds),
    "priors-table": ("docs/priors.md", "priors-cpu.json", priors.markdown),
    "guidance-decoder-table": ("docs/own-prior.md", "guidance_decoder-cpu.json", driver.markdown),
    "cost-way-table": ("docs/cost.md", cost.FILE.name, cost.way_table),
    "cost-presets-table": ("docs/cost.md", cost.FILE.name, cost.presets_table),
    "cost-training-table": ("docs/cost.md", cost.FILE.name, cost.training_table),
    "loader-table": ("docs/benchmarks.md", "loader-cpu.json", driver.markdown),
}
DOCUMENTS = tuple(dict.fromkeys(document for document, _, _ in TABLES.values()))


def filled(text: str, document: str) -> str:
    """A document's text with every table replaced by what the results say; one that is not recorded is left out.

    Raises ValueError: a marker is missing, or a table stands there without a result.
    """
    for name, (of, file, render) in TABLES.items():
        if of != document:
            continue
        pattern = re.compile(f"<!-- {name} -->(.*?)<!-- /{name} -->", re.DOTALL)
        there = pattern.search(text)
        if not (RESULTS / file).exists():
            if there and there[1].strip():
                raise ValueError(f"{document} has a table {name}, and {RESULTS / file} is not recorded")
            continue
        if not there:
            raise ValueError(f"{document} has no <!-- {name} --> ... <!-- /{name} -->")
        block = f"<!-- {name} -->\n{render(json.loads((RESULTS / file).read_text()))}\n<!-- /{name} -->"
        text = text.replace(there[0], block)
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
