"""Options, the measuring fixture and the tables of the suite (docs/benchmarks.md).

A file of the suite, bench_*.py, has `groups(device, quick)` and one test, `def test_...(paired): paired()`, which runs
once a row and turn.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.machine import name_of
from benchmarks.recording import RESULTS
from benchmarks.suite.case import Case, Place, cases
from benchmarks.suite.compare import compare, read, report
from benchmarks.suite.session import TURNS, Session, markdown
from dfkd.files import replace_text

SUITE = Path(__file__).parent
SESSION = pytest.StashKey[Session]()
BEFORE = pytest.StashKey[dict[str, Any] | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite", "the benchmark suite")
    group.addoption("--quick", action="store_true", help="small sizes, few compilers: minutes on two cores")
    group.addoption("--record", action="store_true", help="write benchmarks/results/suite-<device>.json")
    group.addoption("--json", type=Path, metavar="FILE", help="write the result to FILE")
    group.addoption("--against", type=Path, metavar="FILE", help="compare with a recorded result or one of --json")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    option.benchmark_quiet = True  # its table is of times one after another, which a shared machine makes drift
    if getattr(option, "numprocesses", None):
        raise pytest.UsageError("rows are timed one at a time: leave -n out")
    before = None
    if option.against:
        try:
            before = read(option.against)
            compare(before, {"suite": "quick" if option.quick else "full", "rows": []})
        except ValueError as error:
            raise pytest.UsageError(f"--against: {error}") from None
    given = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    if option.record and (given != [SUITE] or option.keyword or option.markexpr):
        raise pytest.UsageError("--record is of the whole suite; --json FILE keeps the result of a part")
    folder = tempfile.TemporaryDirectory(prefix="dfkd-suite-")
    config.add_cleanup(folder.cleanup)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[SESSION] = Session(Place(device, option.quick, Path(folder.name)))
    config.stash[BEFORE] = before


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "paired" in metafunc.fixturenames:
        place = metafunc.config.stash[SESSION].place
        metafunc.parametrize("case", cases(metafunc.module.groups(place.device, place.quick)), ids=str)
        metafunc.parametrize("turn", range(TURNS), ids=lambda turn: f"turn {turn + 1}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.callspec.params.get("turn", 0) if hasattr(item, "callspec") else 0)


@pytest.fixture
def paired(benchmark: BenchmarkFixture, case: Case, turn: int, pytestconfig: pytest.Config) -> Callable[[], None]:
    """Measures a turn of the row of this test, or skips it with the reason."""

    def measure() -> None:
        benchmark.group = case.group.name
        found = pytestconfig.stash[SESSION].measure(case, benchmark.pedantic)
        if isinstance(found, str):
            pytest.skip(found)
        benchmark.extra_info.update(turn=turn, ratios=found)

    return measure


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    session, before, option = config.stash[SESSION], config.stash[BEFORE], config.option
    if not session.measured and not session.skipped:
        return
    result = session.result()
    lines = ["", *markdown(result).splitlines()] + (["", *report(before, result)[0]] if before else [])
    written = [option.json] if option.json else []
    if option.record and exitstatus == pytest.ExitCode.OK:
        kind = "cpu" if session.place.device.type == "cpu" else name_of(result["machine"])
        written.append(RESULTS / f"suite-{kind}.json")
    elif option.record:
        lines += ["", "not recorded: a row failed"]
    for path in written:
        replace_text(path, json.dumps(result, indent=1) + "\n")
        lines += ["", f"written: {path}"]
    for line in lines:
        terminalreporter.write_line(line)
