"""dfkd-engines: compiled networks in a store on disk: build, list, explain, verify, prune."""

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd.cli.parse import command, parse
from dfkd.config import BACKENDS, QUANTISING_BACKENDS, GenerateCommand
from dfkd.config.fields import Config, option
from dfkd.errors import UsageError
from dfkd_engine.backends.packages import versions
from dfkd_engine.devices import architecture, family, targets_of
from dfkd_engine.store import EngineStore, Manifest

if TYPE_CHECKING:
    from dfkd.compiled.functions import Function
    from dfkd_engine.spec import EngineSpec

COMMAND = "dfkd-engines"
_KEYS = ("backends", "networks", "targets", "generate")  # of a set
_USAGE = """usage: dfkd-engines build|list|explain|verify|prune [options] [-- options of dfkd-generate]

  build    compile what is missing, damaged or out of date, and nothing else
  list     the engines that are there, with what was measured of each
  explain  why an engine is not current, field by field
  verify   hash every file; status 1 where an engine is damaged
  prune    remove engines that cannot run here, or all but those of a set

Engines lie in build/engines by default. dfkd-engines COMMAND --help says more.
"""


@dataclass(frozen=True, kw_only=True)
class StoreSettings(Config):
    """Engines: where they lie"""

    engines: Path = option(Path("build/engines"), "folder of the engines")


@dataclass(frozen=True, kw_only=True)
class SetSettings(StoreSettings):
    """Set: which engines, those of a set or of a run of dfkd-generate, whose options stand after --"""

    set: str | None = option(None, "a set of the file; none: the options after -- alone")
    sets: Path = option(Path("build/engines.toml"), "file of sets")
    only: tuple[str, ...] = option((), "these networks alone")
    backend: str | None = option(None, "compile with this backend alone", choices=BACKENDS, extensible=True)
    target: tuple[str, ...] = option(
        (), "GPU architectures to compile for ahead of time, such as sm_89,sm_120: no GPU is needed (tensorrt-rtx)"
    )


class Build(SetSettings):
    """Compile the engines of a set, each traced, compiled, judged against float64 and timed beside eager.

    What is current is left alone. An engine that misses its tolerance is not saved. Killed anywhere, the next build
    goes on where this one stopped. Options of dfkd-generate after -- override the set's:

        dfkd-engines build --set demo
        dfkd-engines build --backend inductor -- --preset demo --teacher-checkpoint runs/mine/teacher

    With --target it compiles for GPUs that are not here. On a machine with such a GPU, and this --engines folder, the
    same command without --target takes over what was compiled, judges and times it.
    """


class Explain(SetSettings):
    """Say for every engine of a set whether it is current and, where it is not, in which fields the nearest differs."""


class List(StoreSettings):
    """List the engines that are there."""


class Verify(StoreSettings):
    """Hash every file of every engine against its manifest. Ends with status 1 where one is damaged."""


@dataclass(frozen=True, kw_only=True)
class Prune(SetSettings):
    """Remove engines that the installed versions cannot run, and what killed builds left.

    With a set, or options of dfkd-generate after --, remove all but its current engines.
    """

    older_than: float = option(0.0, "remove also those that are older; 0: none", unit="days", low=0)
    all: bool = option(False, "remove all of them")
    keep: tuple[str, ...] = option((), "keys to keep in any case")


@dataclass(frozen=True)
class EngineSet:
    """Which engines belong together: a run's settings, what compiles them, which networks (() for all that the run
    uses), and for which GPU architectures where that is done ahead of time."""

    run: GenerateCommand
    backends: tuple[str, ...]
    networks: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def pairs(self, functions: "Sequence[Function]") -> "list[tuple[Function, str]]":
        """Every engine of the set as (function, backend). Raises UsageError: a network that the run does not use, or
        one that no backend of the set takes."""
        from dfkd.compiled.engines import takes

        names = [function.name for function in functions]
        if not names:
            why = "an engine has no backward pass, which --gradient unet needs, and only --method guided takes engines"
            raise UsageError("these options use no engines", why, "use --method guided --gradient latent")
        if unknown := [name for name in self.networks if name not in names]:
            why = f"a run with these options has {', '.join(names)}"
            raise UsageError(f"there is no network {unknown[0]!r}", why, "correct --only, or the set's networks")
        wanted = [function for function in functions if not self.networks or function.name in self.networks]
        for function in wanted:
            if not any(takes(backend, function) for backend in self.backends):
                able = ", ".join(QUANTISING_BACKENDS)
                todo = f"use --backend {QUANTISING_BACKENDS[0]}, or leave it out with --only"
                raise UsageError(
                    f"{', '.join(self.backends)} takes no {function}", f"8-bit networks are engines of {able}", todo
                )
        return [(function, backend) for backend in self.backends for function in wanted if takes(backend, function)]


def read_set(options: SetSettings, more: Sequence[str]) -> EngineSet:
    """The engines that --set and the flags after -- name. Raises UsageError: no such file, set, key or option."""
    table = _table(options.sets, options.set) if options.set else {}
    words = [word for key, value in table.get("generate", {}).items() for word in _words(key, value)]
    run = parse(GenerateCommand, ["--out", ".", *words, *more], "dfkd-generate")
    backends = (options.backend,) if options.backend else tuple(table.get("backends", ()))
    if unknown := [name for name in backends if name not in BACKENDS and ".py:" not in name]:
        known = ", ".join(BACKENDS)
        raise UsageError(f"the set {options.set} names the backend {unknown[0]!r}", f"known are {known}")
    able = BACKENDS if run.generate.compute.quantise == "none" else QUANTISING_BACKENDS
    networks, targets = (tuple(table.get(key, ())) for key in ("networks", "targets"))
    return EngineSet(run, backends or able[:1], options.only or networks, options.target or targets)


def build(options: Build, more: Sequence[str]) -> dict[str, Any]:
    chosen = read_set(options, more)
    functions = _functions(chosen)
    pairs, store = chosen.pairs(functions), EngineStore(options.engines)
    from dfkd.compiled import engines
    from dfkd.runtime import choose_kernels

    # what is compiled ahead of time is timed on another machine
    here = "torch" if chosen.targets else choose_kernels(chosen.run.generate.compute.kernels, functions[0].device).name
    keys, counts = {}, {"current": 0, "built": 0}
    for number, (function, backend) in enumerate(pairs, 1):

        def say(line: str, number: int = number) -> None:
            print(f"[{number}/{len(pairs)}] {line}", file=sys.stderr, flush=True)

        state, manifest = engines.build(function, backend, store, targets=chosen.targets, kernels=here, say=say)
        counts[state] += 1
        keys[f"{function.name} {backend}"] = manifest.key
        if state == "built":
            print(f"    built {_measured(manifest.facts)}", file=sys.stderr)
    print(f"{counts['current']} engines current, {counts['built']} built", file=sys.stderr)
    return {"engines": options.engines, **counts, "keys": keys}


def explain(options: Explain, more: Sequence[str]) -> dict[str, Any]:
    from dfkd.compiled.engines import reasons

    store, found = EngineStore(options.engines), {}
    for what, spec in _specs(options, more):
        fields = store.explain(spec)
        print(f"{what} in {spec.backend}: {'not current' if fields else 'current'}", file=sys.stderr)
        for reason in reasons(fields):
            print(f"    {reason}", file=sys.stderr)
        found[f"{spec.network} {spec.backend}"] = fields
    return {"engines": options.engines, "differences": found}


def listing(options: List, more: Sequence[str]) -> dict[str, Any]:
    found = EngineStore(options.engines).list()
    measured = ("ms", "eager ms", "error", "group norm", "compiled in", "size")
    rows = [("network", "backend", "for", "rows", "dtype", *measured, "key")]
    for manifest in found:
        facts, spec = manifest.facts, manifest.spec
        judged = "parity" in facts  # else it was compiled ahead of time, and nothing here can run it
        times = facts["milliseconds"] if judged else {"engine": "-", "eager": "-"}
        rows.append((
            spec.network, spec.backend, " ".join(targets_of(spec.device)) or "here", str(spec.rows[2]),
            spec.flags.get("quantise", spec.dtype),
            str(times["engine"]), str(times["eager"]), f"{facts['parity']['relative']:.1e}" if judged else "-",
            _group_norm(manifest), f"{facts['compile_seconds']:.0f} s", _size(manifest.bytes), manifest.key,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    print("\n".join(lines) if found else f"no engines in {options.engines}", file=sys.stderr)
    return {"engines": options.engines, "keys": [manifest.key for manifest in found]}


def verify(options: Verify, more: Sequence[str]) -> dict[str, Any]:
    verdicts = EngineStore(options.engines).verify()
    for key, network, problem in verdicts:
        print(f"{network} {key}: {problem or 'sound'}", file=sys.stderr)
    damaged = [key for key, _, problem in verdicts if problem is not None]
    if damaged:
        print("mend them with dfkd-engines build", file=sys.stderr)
    return {"engines": options.engines, "sound": len(verdicts) - len(damaged), "damaged": damaged}


def prune(options: Prune, more: Sequence[str]) -> dict[str, Any]:
    store = EngineStore(options.engines)
    found = store.list()
    oldest = datetime.now(UTC) - timedelta(days=options.older_than or 10**5)
    keep = {
        manifest.key
        for manifest in found
        if _runs_here(manifest.spec.versions) and datetime.fromisoformat(manifest.created) > oldest and not options.all
    }
    if options.set or more:
        keep &= {spec.key() for _, spec in _specs(options, more)}
    freed = store.prune(keep.union(options.keep))
    removed = len(found) - len(store.list())
    print(f"{removed} engines removed, {_size(freed)} freed", file=sys.stderr)
    return {"engines": options.engines, "removed": removed, "bytes_freed": freed}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if words else 2)
    if words[0] not in _COMMANDS:
        what = "argument" if words[0].startswith("-") else "command"
        print(f"error: unknown {what} {words[0]}.\n{_USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    split = words.index("--") if "--" in words else len(words)
    kind, run = _COMMANDS[words[0]]
    last: dict[str, Any] = {}

    def with_rest(options: Any) -> Mapping[str, Any]:
        last.update(run(options, words[split + 1 :]))
        return last

    status = command(kind, with_rest, f"{COMMAND} {words[0]}", words[1:split])
    sys.exit(status or int(bool(last.get("damaged"))))


_COMMANDS: dict[str, tuple[type[Config], Callable[[Any, Sequence[str]], dict[str, Any]]]] = {
    "build": (Build, build),
    "list": (List, listing),
    "explain": (Explain, explain),
    "verify": (Verify, verify),
    "prune": (Prune, prune),
}


def _functions(chosen: EngineSet) -> "tuple[Function, ...]":
    from dfkd.cli.progress import say
    from dfkd.synthesis.command import pipeline_of

    found: tuple[Function, ...] = getattr(pipeline_of(chosen.run, say), "functions", tuple)()
    return found


def _specs(options: SetSettings, more: Sequence[str]) -> "list[tuple[Function, EngineSpec]]":
    """What the engines of a set are made of, nothing compiled."""
    from dfkd.compiled.engines import engine_spec

    chosen = read_set(options, more)
    functions = _functions(chosen)
    pairs = chosen.pairs(functions)
    device = family(chosen.targets) if chosen.targets else architecture(functions[0].device)
    return [(function, engine_spec(function, backend, device)) for function, backend in pairs]


def _table(file: Path, name: str) -> Mapping[str, Any]:
    """The set `name` of a file of the form of build/engines.toml. Raises UsageError."""
    try:
        sets = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        todo = "run in a checkout of the project, or name a file with --sets; or give options of dfkd-generate after --"
        raise UsageError(f"cannot read {file}", error.strerror or str(error), todo) from None
    except ValueError as error:
        raise UsageError(f"{file} is not TOML", str(error)) from None
    if name not in sets:
        raise UsageError(f"{file} has no set {name!r}", f"it has {', '.join(sets)}", "choose one of them with --set")
    table: Mapping[str, Any] = sets[name]
    if unknown := sorted(table.keys() - set(_KEYS)):
        raise UsageError(f"{file}: [{name}] has an unknown key {unknown[0]!r}", f"known are {', '.join(_KEYS)}")
    return table


def _words(key: str, value: object) -> list[str]:
    """One key of a set's `generate` as flags."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{key}"]
    return [f"--{key}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]


def _runs_here(built_with: Mapping[str, str]) -> bool:
    """Whether every package that is installed here is of the version that an engine was built with."""
    return built_with == {**built_with, **versions(*built_with)}


def _group_norm(manifest: Manifest) -> str:
    """The group norm that an engine's graph was given, for a column of `dfkd-engines list`.

    Behind it stand the milliseconds of each that was timed; "-" for an engine that had no choice.
    """
    measured = manifest.facts.get("group_norm")
    if measured is None:
        return "-"
    spent = ", ".join(f"{name} {milliseconds} ms" for name, milliseconds in measured["milliseconds"].items())
    return f"{measured['kept']} ({spent})"


def _measured(facts: Mapping[str, Any]) -> str:
    if "milliseconds" not in facts:
        return f"in {facts['compile_seconds']:.0f} s ahead of time; it is judged on the GPU that takes it over"
    times = facts["milliseconds"]
    return (
        f"in {facts['compile_seconds']:.0f} s; error {facts['parity']['relative']:.1e}; "
        f"{times['engine']:.0f} ms a call of {times['rows']} rows, eager {times['eager']:.0f}"
        + (" with Triton's kernels" if times["kernels"] == "triton" else "")
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
