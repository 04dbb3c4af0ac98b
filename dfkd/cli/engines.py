"""dfkd-engines: compiled networks in a store on disk: build, list, explain, verify, prune."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dfkd.config import STORED_BACKENDS
from dfkd.cli.options import command, option
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import DIGESTS, Request, architecture_of, request, takes
from dfkd.compiled.sets import EngineSet, narrowed, read_set, set_of
from dfkd.compiled.text import causes, size, table
from dfkd_engine.backends.packages import versions
from dfkd_engine.storage.manifest import Manifest
from dfkd_engine.store import EngineStore
from dfkd_engine.targets import family, targets_of

COMMAND = "dfkd-engines"
SETS = Path("build/engines.toml")
STORE = Path("build/engines")
_USAGE = """usage: dfkd-engines build|list|explain|verify|prune [options] [-- options of dfkd-generate]

  build    compile what is missing, damaged or out of date, and nothing else
  list     the engines that are there, with what was measured of each
  explain  why an engine of a set is not current, field by field
  verify   hash every file; status 1 where an engine is damaged
  prune    remove engines

Engines lie in build/engines by default. dfkd-engines COMMAND --help says more.
"""


@dataclass(frozen=True)
class SetOptions:
    """Which engines: a set of build/engines.toml, or those of a run of dfkd-generate, whose options stand after --."""

    set: str = option("", "a set of the file; none: the options after -- alone")
    sets: Path = option(SETS, "file of sets")
    only: tuple[str, ...] = option((), "these networks alone")
    backend: str = option("", "compile with this backend alone", choices=("", *STORED_BACKENDS))
    target: tuple[str, ...] = option(
        (), "GPU architectures to compile for ahead of time, such as sm_89,sm_120: no GPU is needed (tensorrt-rtx)"
    )
    engines: Path = option(STORE, "folder of the engines")


@dataclass(frozen=True)
class BuildOptions(SetOptions):
    """Compile the engines of a set, each traced, compiled, judged against float64 and timed beside eager.

    What is current is left alone. An engine that misses its tolerance is not saved. Killed anywhere, the next build
    goes on where this one stopped. Options of dfkd-generate after -- override the set's:

        dfkd-engines build --set demo
        dfkd-engines build --backend inductor -- --preset demo --teacher-checkpoint runs/mine/teacher

    With --target it compiles for GPUs that are not here. On a machine with such a GPU, and this --engines folder, the
    same command without --target takes over what was compiled, judges and times it.
    """


@dataclass(frozen=True)
class ExplainOptions(SetOptions):
    """Say for every engine of a set whether it is current and, where it is not, in which fields the nearest differs."""


@dataclass(frozen=True)
class ListOptions:
    """List the engines that are there."""

    engines: Path = option(STORE, "folder of the engines")


@dataclass(frozen=True)
class VerifyOptions(ListOptions):
    """Hash every file of every engine against its manifest. Ends with status 1 where one is damaged."""


@dataclass(frozen=True)
class PruneOptions(ListOptions):
    """Remove engines that the installed versions cannot run, what killed builds left, and links that lead nowhere."""

    older_than: float = option(0.0, "remove also those that are older; 0: none", unit="days", low=0)
    all: bool = option(False, "remove all of them")
    keep: tuple[str, ...] = option((), "keys to keep in any case")


def build(options: BuildOptions, more: Sequence[str]) -> dict[str, Any]:
    chosen = _chosen(options, more)
    store = EngineStore(options.engines)
    wanted = _requests(chosen, options.engines)
    missing = [r for r in wanted if (found := store.find(r.recipe)) is None or store.problem(found.key) is not None]
    print(f"{len(wanted)} engines of {_name(chosen)}, {len(wanted) - len(missing)} current", file=sys.stderr)
    counts = {"current": len(wanted) - len(missing), "adopted": 0, "built": 0}
    if missing:
        # Only now: these load torch and the networks, and seconds pass.
        from dfkd.cli.generate import quieten_libraries
        from dfkd.runtime import resolve_device
        from dfkd.compiled.build import Workshop
        from dfkd.compiled.calibration import calibrate
        from dfkd.compiled.sources import load_sources
        from dfkd.runtime import choose_kernels

        quieten_libraries()
        given, ahead = chosen.options, bool(chosen.targets)
        here = None if ahead else choose_kernels(given.kernels, resolve_device(given.device))
        workshop = Workshop(
            store,
            lambda: load_sources(chosen.options, [r.network for r in missing]),
            lambda prior, narrow: calibrate(chosen.options, prior, narrow),
            here.name if here else "torch",  # what is compiled ahead of time is timed on another machine
        )
        for number, one in enumerate(missing, 1):
            print(
                f"[{number}/{len(missing)}] {one}: {'; '.join(causes(store.explain(one.recipe)))}",
                file=sys.stderr,
                flush=True,
            )
            state, manifest = workshop.build(one)
            counts[state] += 1
            print(f"    {state} {_facts(manifest.facts) if state == 'built' else manifest.key}", file=sys.stderr)
    keys = {f"{r.network} {r.backend}": m.key for r in wanted if (m := store.find(r.recipe)) is not None}
    return {"engines": options.engines, **counts, "keys": keys}


def explain(options: ExplainOptions, more: Sequence[str]) -> dict[str, Any]:
    chosen = _chosen(options, more)
    store = EngineStore(options.engines)
    found = {}
    for one in _requests(chosen, options.engines):
        fields = store.explain(one.recipe)
        print(f"{one}: {'current' if not fields else 'not current'}", file=sys.stderr)
        for cause in causes(fields):
            print(f"    {cause}", file=sys.stderr)
        found[f"{one.network} {one.backend}"] = [list(field) for field in fields]
    return {"engines": options.engines, "differences": found}


def listing(options: ListOptions, more: Sequence[str]) -> dict[str, Any]:
    found = EngineStore(options.engines).list()
    measured = ("ms", "eager ms", "error", "group norm", "compiled in", "size")
    rows = [("network", "backend", "for", "rows", "dtype", *measured, "key")]
    for manifest in found:
        facts, spec = manifest.facts, manifest.spec
        judged = not targets_of(spec.device)  # else it was compiled ahead of time, and nothing here can run it
        times = facts["milliseconds"] if judged else {"engine": "-", "eager": "-"}
        rows.append((
            spec.network, spec.backend, " ".join(targets_of(spec.device)) or "here", str(spec.batch[2]),
            dict(spec.flags).get("quantise", spec.dtype),
            str(times["engine"]), str(times["eager"]), f"{facts['parity']['relative']:.1e}" if judged else "-",
            group_norm(manifest), f"{facts['compile_seconds']:.0f} s", size(manifest.bytes), manifest.key,
        ))  # fmt: skip
    print(table(rows) if found else f"no engines in {options.engines}", file=sys.stderr)
    return {"engines": options.engines, "keys": [manifest.key for manifest in found]}


def group_norm(manifest: Manifest) -> str:
    """Which group norm an engine's graph has, with what was timed where both were; "-" of a backend with its own."""
    if manifest.spec.backend != "inductor":
        return "-"
    measured = manifest.facts.get("group_norm")
    if measured is None:
        return dict(manifest.spec.flags).get("group_norm", "torch")
    spent = ", ".join(f"{name} {milliseconds} ms" for name, milliseconds in measured["milliseconds"].items())
    return f"{measured['kept']} ({spent})"


def verify(options: VerifyOptions, more: Sequence[str]) -> dict[str, Any]:
    verdicts = EngineStore(options.engines).verify()
    for key, network, problem in verdicts:
        print(f"{network} {key}: {problem or 'sound'}", file=sys.stderr)
    damaged = [key for key, _, problem in verdicts if problem is not None]
    if damaged:
        print("mend them with dfkd-engines build", file=sys.stderr)
    return {"engines": options.engines, "sound": len(verdicts) - len(damaged), "damaged": damaged}


def prune(options: PruneOptions, more: Sequence[str]) -> dict[str, Any]:
    store = EngineStore(options.engines)
    found = store.list()
    oldest = datetime.now(UTC) - timedelta(days=options.older_than or 10**5)
    keep = {
        manifest.key
        for manifest in found
        if dict(manifest.spec.versions) == versions(*dict(manifest.spec.versions))
        and datetime.fromisoformat(manifest.created) > oldest
        and not options.all
    }
    before = len(found)
    freed = store.prune(keep | set(options.keep))
    removed = before - len(store.list())
    print(f"{removed} engines removed, {size(freed)} freed", file=sys.stderr)
    return {"engines": options.engines, "removed": removed, "bytes_freed": freed}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if words else 2)
    if words[0] not in _COMMANDS:
        kind_of = "argument" if words[0].startswith("-") else "command"
        print(f"error: unknown {kind_of} {words[0]}.\n{_USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    split = words.index("--") if "--" in words else len(words)
    kind, run = _COMMANDS[words[0]]
    last: dict[str, Any] = {}

    def with_rest(options: Any) -> Mapping[str, Any]:
        last.update(run(options, words[split + 1 :]))
        return last

    status = command(kind, with_rest, f"{COMMAND} {words[0]}", words[1:split])
    sys.exit(status or int(bool(last.get("damaged"))))


_COMMANDS: dict[str, tuple[type[Any], Callable[[Any, Sequence[str]], dict[str, Any]]]] = {
    "build": (BuildOptions, build),
    "list": (ListOptions, listing),
    "explain": (ExplainOptions, explain),
    "verify": (VerifyOptions, verify),
    "prune": (PruneOptions, prune),
}


def _chosen(options: SetOptions, more: Sequence[str]) -> EngineSet:
    chosen = read_set(options.sets, options.set, more) if options.set else set_of(more)
    return narrowed(chosen, options.only, options.backend, options.target)


def _requests(chosen: EngineSet, root: Path) -> list[Request]:
    memory = FileDigests(root / DIGESTS)
    device = family(chosen.targets) if chosen.targets else architecture_of(chosen.options.device)
    pairs = [(name, b) for b in chosen.backends for name in chosen.networks if takes(chosen.options, name, b)]
    found = [request(chosen.options, name, b, device, memory) for name, b in pairs]
    memory.save()
    return found


def _name(chosen: EngineSet) -> str:
    return f"the set {chosen.name}" if chosen.name else "these options"


def _facts(facts: Mapping[str, Any]) -> str:
    if "milliseconds" not in facts:
        return f"in {facts['compile_seconds']:.0f} s ahead of time; it is judged on the GPU that takes it over"
    times = facts["milliseconds"]
    return (
        f"in {facts['compile_seconds']:.0f} s; error {facts['parity']['relative']:.1e}; "
        f"{times['engine']:.0f} ms a call of {times['rows']} rows, eager {times['eager']:.0f}"
        + (" with Triton's kernels" if times.get("kernels") == "triton" else "")
    )
