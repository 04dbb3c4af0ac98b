"""`make bench`: every part of the project beside its baseline, and what has become slower or faster since.

    python -m benchmarks.suite                               all rows: calls of 64 images, every compiler
    python -m benchmarks.suite --quick                       calls of 16, hardly a compiler: minutes on two cores
    python -m benchmarks.suite --only "loader|a step"        groups whose name has it (a regular expression)
    python -m benchmarks.suite --record                      all rows into benchmarks/results/suite-<device>.json
    python -m benchmarks.suite --against FILE                compare with a result; exits with 1 where rows differ
    python -m benchmarks.suite --read FILE --against FILE    compare two results, and time nothing

Groups are those of the benchmarks bench_*.py. All are gone through twice, every row made anew: half of a row's turns
are minutes from the others, in other memory, and so its spread has in it what would differ between two runs.

Two results differ in a row where the spreads of its ratio (least to greatest, as printed) do not overlap. A baseline
has no ratio and is compared with nothing: a slower machine is no slower part. Where all rows of a group differ in one
direction, its baseline is what changed.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_distill, bench_engines, bench_loader, bench_parts, bench_sampling, demo, driver
from benchmarks.driver import Group
from benchmarks.machine import describe
from benchmarks.recording import finish, words
from dfkd.files import replace_text

TURNS = {"quick": 5, "full": 8}  # of every row in each of PASSES
PASSES = 2
QUICK_SETS = {"32 png": (32, "png", 1024)}
WORKERS = 2  # processes or threads that decode


def groups(device: torch.device, quick: bool, folder: Path) -> list[Group]:
    """All groups. folder: an empty one, for what rows write."""
    images = 16 if quick else 64
    ways = [way for way, own in bench_distill.WAYS.items() if not (quick and "compile" in own)]
    pairs = bench_distill.defaults(device)[: 1 if quick else None]
    pipe = demo.pipeline(images, device, **bench_engines.PLAIN)
    engines = ("eager", "channels_last") if quick else bench_engines.WAYS
    networks = bench_sampling.demo_networks(images, device, **({"steps": 4} if quick else {}))
    names = [name for name in bench_sampling.NAMES if not (quick and name == bench_sampling.PEERS[1])]
    return [
        *bench_distill.groups(pairs, device, ways),
        *bench_engines.groups(pipe, [images], folder, ways=engines),
        *bench_loader.groups(device, folder, WORKERS, QUICK_SETS if quick else bench_loader.SETS, stepped=not quick),
        *bench_parts.groups(device, folder),
        *bench_sampling.groups(networks, images, names=names),
    ]


def verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """ "slower", "faster", or "" where the spreads of two ratios overlap as they are printed."""
    (low, high), (least, most) = ([float(f"{r[end]:.3g}") for end in ("min", "max")] for r in (before, after))
    return "slower" if most < low else "faster" if least > high else ""


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Lines that name the rows that differ, the slowest change first, and the rows of one result alone; and whether any
    differs."""
    one, other = (
        {(r["group"], r["name"]): r["ratio"] for r in result["rows"] if r["ratio"] and not r["baseline"]}
        for result in (before, after)
    )
    both = sorted(one.keys() & other.keys(), key=lambda key: other[key]["median"] / one[key]["median"])
    differing = [(key, how) for key in both if (how := verdict(one[key], other[key]))]
    lines = [
        f"{of}: {name} is {how}: ratio {words(one[of, name])} before, {words(other[of, name])} now"
        for (of, name), how in differing
    ]
    for which, alone in (("before", one.keys() - other.keys()), ("now", other.keys() - one.keys())):
        lines += [f"only {which}: {', '.join(sorted(': '.join(key) for key in alone))}"] if alone else []
    if (a := before["machine"]["device"]) != (b := after["machine"]["device"]):
        lines.append(f"two machines, {a} and {b}: ratios differ between machines too")
    return [*lines, f"{len(differing)} of {len(both)} rows differ"], bool(differing)


def read(path: Path) -> dict[str, Any]:
    """A result. Raises SystemExit: the file is not there, or is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        assert result["suite"] in TURNS and result["rows"][0]["ratio"]
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError, IndexError, AssertionError):
        sys.exit(f"error: {path} is no result of the suite (--record or --json FILE write one)")
    return result


def main() -> None:
    parser = driver.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few compilers: minutes on two cores")
    parser.add_argument("-k", "--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="some groups")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a recorded result or one of --json")
    parser.add_argument("--read", type=Path, metavar="FILE", help="a result in the place of a measurement")
    a = parser.parse_args()
    suite, before = "quick" if a.quick else "full", read(a.against) if a.against else None
    if a.record and a.only.pattern:
        parser.error("--record is of the whole suite; --json FILE keeps the result of a part")
    result = read(a.read) if a.read else {}
    if before and before["suite"] != (result or {"suite": suite})["suite"]:
        parser.error(f"--against: {a.against} is of the {before['suite']} suite: sizes differ")
    if not a.read:
        result = {"machine": describe(a.device), "suite": suite, "command": "make bench" + " ARGS=--quick" * a.quick}
        result["note"] = f"{suite.capitalize()} suite, load {os.getloadavg()[0]:.1f} before it began. "
        with tempfile.TemporaryDirectory() as folder:
            chosen = [group for group in groups(a.device, a.quick, Path(folder)) if a.only.search(group.name)]
            for found in driver.measure(chosen, a.device, TURNS[suite], PASSES):
                result |= found
        if a.json:
            replace_text(a.json, json.dumps(result, indent=1) + "\n")
        finish(result, driver.markdown(result), "suite" if a.record else "")
    if before:
        lines, differ = compare(before, result)
        print("", *lines, sep="\n", file=sys.stderr)
        sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
