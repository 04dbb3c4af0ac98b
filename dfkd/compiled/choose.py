"""Which backend runs which network of a synthesis, and why.

`auto` takes the quickest engine that the store holds for exactly these networks, and eager where none was measured
quicker by a clear margin; a named backend must have them all. Nothing is built here.

On a CPU `auto` leaves engines aside whose rows change their bits with the size of a call. Eager rows keep theirs there,
guidance amplifies such a difference until it is seen, and --batch decides no image. On a GPU the libraries choose
kernels by shape, eager or not, and nothing would be kept.

With --quantise the UNet is an 8-bit engine or the run is refused, under `auto` too; the other networks choose as ever.
Without it no 8-bit engine is looked at.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dfkd.config import STORED_BACKENDS
from dfkd.cli.generate_options import GenerateOptions
from dfkd.compiled.build import identity as held_by
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.functions import Sources
from dfkd.compiled.guidance import CompiledGuidance, CompiledPrior
from dfkd.compiled.requests import DIGESTS, TORCH_NAMES, Request, architecture_of, in_group, needed, requests
from dfkd.compiled.text import causes
from dfkd.errors import UsageError
from dfkd.synthesis.run import Synthesis
from dfkd_engine.backends import get
from dfkd_engine.compiled import load
from dfkd_engine.errors import EngineError
from dfkd_engine.storage.manifest import Manifest
from dfkd_engine.store import EngineStore

EAGER = "eager"
MARGIN = 0.95  # an engine's time over eager's below which it is taken: closer than that is noise


@dataclass(frozen=True)
class Choice:
    """What runs one network: an engine of the store, or eager where key is None; `why` is for people."""

    network: str
    backend: str
    key: str | None
    why: str


def choose(
    options: GenerateOptions, store: EngineStore, build_command: str, before: Mapping[str, str] | None = None
) -> tuple[Choice, ...]:
    """A choice for every network, without loading any.

    before: network -> key or "eager", as a folder that is continued was begun: `auto` goes on with it, since engines
        differ in the last bits.

    Raises UsageError: a named backend lacks an engine (with the command that builds it), cannot be used with these
    options, or an engine that the folder was begun with is gone.
    """
    networks = needed(options)
    if options.backend == EAGER:
        return tuple(Choice(name, EAGER, None, "--backend eager") for name in networks)
    if not networks:
        if options.backend != "auto":
            why = "it differentiates through UNet and decoder, and an engine has no backward pass"
            raise UsageError(
                f"--gradient unet cannot run on --backend {options.backend}", why, "use --gradient latent, or eager"
            )
        return ()
    memory = FileDigests(store.root / DIGESTS)
    device = architecture_of(options.device)
    wanted = STORED_BACKENDS if options.backend == "auto" else (options.backend,)
    if options.backend != "auto":
        reason = get(options.backend).unusable(device, TORCH_NAMES[options.dtype])
        if reason is not None:
            raise UsageError(f"--backend {options.backend} cannot be used", reason, "or choose another --backend")
    asked = {name: requests(options, name, device, memory) for name in wanted}
    memory.save()
    found = {
        network: [(r, m) for of in asked.values() for r in of if r.network == network and (m := store.find(r.recipe))]
        for network in networks
    }
    if options.backend != "auto":
        lacking = [network for network in networks if not found[network]]
        if lacking:
            request = next(r for r in asked[options.backend] if r.network == lacking[0])
            raise UsageError(
                f"there is no {options.backend} engine in {store.root} for {', '.join(lacking)}",
                f"{lacking[0]}: {'; '.join(causes(store.explain(request.recipe)))}",
                f"build it: {build_command}",
            )
        return tuple(_chosen(found[network][0][1], f"--backend {options.backend}") for network in networks)
    if options.quantise != "none":
        unet = _asked_for(options, store, found["unet"], asked, build_command, before)
        others = tuple(network for network in networks if network != "unet")
        return unet, *_by_measurement(options, others, found, device, build_command, before)
    return _by_measurement(options, networks, found, device, build_command, before)


def _asked_for(
    options: GenerateOptions,
    store: EngineStore,
    found: Sequence[tuple[Request, Manifest]],
    asked: Mapping[str, Sequence[Request]],
    build_command: str,
    before: Mapping[str, str] | None,
) -> Choice:
    """The 8-bit UNet: the engine that the folder was begun with, or the quickest. Raises UsageError: there is none."""
    if not found:
        request = next(r for of in asked.values() for r in of if r.network == "unet")
        raise UsageError(
            f"there is no {options.quantise} engine of the UNet in {store.root}",
            "; ".join(causes(store.explain(request.recipe))),
            f"build it: {build_command}",
        )
    engines = [manifest for _, manifest in found]
    begun = [manifest for manifest in engines if before is not None and manifest.key == before.get("unet")]
    best = min(begun or engines, key=lambda manifest: float(manifest.facts["milliseconds"]["engine"]))
    return _chosen(best, f"--quantise {options.quantise}")


def _by_measurement(
    options: GenerateOptions,
    networks: Sequence[str],
    found: Mapping[str, list[tuple[Request, Manifest]]],
    device: str,
    build_command: str,
    before: Mapping[str, str] | None,
) -> tuple[Choice, ...]:
    if before is not None:  # empty for a folder that was begun without engines
        return tuple(_again(network, before.get(network, EAGER), found[network], build_command) for network in networks)
    usable = {network: [m for _, m in found[network]] for network in networks}
    if device.startswith("cpu"):
        return tuple(_quickest(name, usable[name], _steady(name, usable[name], options)) for name in networks)
    return tuple(_quickest(name, usable[name], usable[name]) for name in networks)


def in_words(choices: Iterable[Choice]) -> list[str]:
    """A line for each backend and reason."""
    lines: dict[str, list[str]] = {}
    for choice in choices:
        lines.setdefault(f"{choice.backend} ({choice.why})", []).append(choice.network)
    return [f"{', '.join(networks)}: {how}" for how, networks in lines.items()]


def apply(synthesis: Synthesis, sources: Sources, choices: tuple[Choice, ...], store: EngineStore) -> Synthesis:
    """The synthesis on the engines that were chosen, each verified before it is loaded.

    Raises EngineError: an engine is damaged, or does not hold the networks in memory.
    """
    engines = {}
    for choice in choices:
        if choice.key is None:
            continue
        manifest = store.get(choice.key)
        assert manifest is not None
        _require_same(manifest, sources, store)
        engines[choice.network] = load(store, choice.key, synthesis.device)
    if not engines:
        return synthesis
    guidance = CompiledGuidance(synthesis.guidance, engines) if synthesis.guidance else None
    return replace(synthesis, prior=CompiledPrior.of(synthesis.prior, engines), guidance=guidance)


def _steady(network: str, engines: list[Manifest], options: GenerateOptions) -> list[Manifest]:
    """Those that --batch decides nothing with; a group's gradient in one call has always the same rows."""
    if network in ("gradient", "pixel_gradient") and in_group(options):
        return engines
    return [manifest for manifest in engines if manifest.facts["rows_exact"]]


def _quickest(network: str, built: list[Manifest], steady: list[Manifest]) -> Choice:
    if not built:
        return Choice(network, EAGER, None, "no engine is built: dfkd-engines build")
    if not steady:
        return Choice(network, EAGER, None, "an engine's images would depend on --batch: name its --backend to have it")
    best = min(steady, key=lambda manifest: float(manifest.facts["milliseconds"]["engine"]))
    times = best.facts["milliseconds"]
    measured = f"{times['rows']} rows, {times['threads']} threads, when it was built"
    if times["engine"] < MARGIN * times["eager"]:
        return _chosen(best, f"{times['engine']} ms a call, eager {times['eager']}: {measured}")
    why = f"{times['eager']} ms a call, {best.spec.backend} {times['engine']}: {measured}"
    return Choice(network, EAGER, None, why)


def _again(network: str, key: str, found: list[tuple[Request, Manifest]], build_command: str) -> Choice:
    if key == EAGER:
        return Choice(network, EAGER, None, "the folder was begun with it")
    for _, manifest in found:
        if manifest.key == key:
            return _chosen(manifest, "the folder was begun with it")
    why = (
        f"it was begun with the {network} engine {key}, which these options do not lead to now; "
        "others differ in the last bits"
    )
    todo = f"repeat --batch and --quantise, build it again ({build_command}), or choose another --out"
    raise UsageError("this folder cannot be continued", why, todo)


def _chosen(manifest: Manifest, why: str) -> Choice:
    return Choice(manifest.spec.network, manifest.spec.backend, manifest.key, why)


def _require_same(manifest: Manifest, sources: Sources, store: EngineStore) -> None:
    for name, here in held_by(manifest.spec.network, sources).items():
        if (there := manifest.facts.get(name)) != here:
            why = f"its {name} is {str(there)[:12]}, that of the networks in memory {here[:12]}"
            # only so: a file was changed under the size and time that its digest is remembered by
            todo = f"delete {store.root / DIGESTS} and run dfkd-engines build"
            raise EngineError(f"the engine {manifest} is stale", why, todo)
