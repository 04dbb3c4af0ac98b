"""The plan of a synthesis: how many images a network call holds, what bounds them, and how long it will all take.

The call size follows from the settings, the networks' shapes and the device, and from nothing that changes between two
starts. Memory is measured on calls of one and two images; seconds are those of engines when they were built, or of a
trial. An engine is taken to need no more memory than the networks that it was made from.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.data import encode
from dfkd.synthesis.batching import ShortMemory, calling, release
from dfkd.synthesis.synthesizer import Synthesizer, innermost, trajectories
from dfkd_engine.memory import Footprint, footprint, halved, most_rows, shared, weight_bytes
from dfkd_engine.store import EngineStore
from dfkd_kernels.guided_step import clean_estimate

if TYPE_CHECKING:
    from dfkd.synthesis.pipeline import GuidedPipeline

# Of a device's memory. The rest is for the scratch memory of kernels, fragmentation and the driver; on a CPU for
# everything else that runs.
_USABLE = {"cuda": 0.85, "cpu": 0.6}
_HELD = 4  # times that a pass' images are held at once in float32: decoded, refined, pushed and their gradient
_SMALL = 64  # side of images up to which a network is run to be measured: that is quicker than a run without data
_TRIAL = 5e10  # FLOP of a timed call on a CPU. It is no time: on a busy machine small calls are the slowest by far
_LONG = 5.0  # seconds of a call past which it is not called again

Call = Callable[[int], object]


@dataclass(frozen=True)
class Plan:
    """How a synthesis is cut into network calls: their size, what bounds it, and the memory that they take.

    call_size: images a network call. group: images that interact. bound: what made the call size smaller than asked,
    "" where nothing did. rows: images a call by network, and needs: what a call takes, a row being an image; {} for a
    method whose calls are not known. held: bytes of weights and of a pass' images. memory: of the device, 0 if unknown.
    snapshots: images that come of one trajectory; where these are several, it is one of them that a call holds.
    """

    call_size: int
    group: int = 1
    bound: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    needs: Mapping[str, Footprint] = field(default_factory=dict)
    held: int = 0
    memory: int = 0
    snapshots: int = 1

    @property
    def trajectories(self) -> int:
        """Trajectories of a pass of the sampler: whole groups."""
        return max(self.call_size // self.group, 1) * self.group

    @property
    def images(self) -> int:
        """Images of a pass of the sampler."""
        return self.trajectories * self.snapshots

    def bytes(self, network: str) -> int:
        """Memory of one call at its peak, in bytes, without weights."""
        return self.needs[network].bytes(self.rows[network])

    def describe(self) -> str:
        """The call size, what bounds it and the memory that it takes, as the line that a run prints."""
        found = f"plan: calls of {self.call_size} images" + (f", as {self.bound} allows" if self.bound else "")
        if not self.needs:
            return found
        peak = self.held + max(self.bytes(name) for name in self.needs)
        return f"{found}; they take {size(peak)}" + (f" of {size(self.memory)}" if self.memory else "")

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        calls = {
            name: {"images": self.rows[name], "bytes": self.bytes(name), "flop_per_image": found.flop}
            for name, found in self.needs.items()
        }
        sizes = {"call_size": self.call_size, "group": self.group, "bound": self.bound}
        return {**sizes, "held_bytes": self.held, "memory_bytes": self.memory or None, "calls": calls}


def make_plan(synthesizer: Synthesizer, config: GenerateConfig, processes: int = 1) -> Plan:
    """The plan of a new folder, on eager networks. processes: that share the memory of a CPU."""
    batch, group, inner = config.batching.batch, trajectories(synthesizer), innermost(synthesizer)
    if not hasattr(inner, "pack"):
        return Plan(batch, group)
    pipe = cast("GuidedPipeline", inner)
    device = pipe.device
    memory = device_bytes(device) // (processes if device.type == "cpu" else 1)
    networks = [*pipe.prior.networks.values()]
    networks += [pipe.guidance_decoder.network] if pipe.guidance_decoder is not None else []
    networks += [own.module for own in (pipe.teacher, pipe.student) if own is not None]
    held = weight_bytes(*networks) + _HELD * 4 * 3 * pipe.image_size**2 * max(batch, group)
    calls = network_calls(pipe)
    needs = {name: footprint(call, without_data=pipe.image_size > _SMALL) for name, call in calls.items()}
    in_groups = _calls_of_groups(pipe)
    most, bound = batch, ""
    for name, found in needs.items():
        limits = {"2^31 elements": most_rows(found.elements)}
        if memory:
            limits["memory"] = found.most_rows(int(_USABLE[device.type] * memory) - held)
        for limit, images in limits.items():
            if images < most and not (name in in_groups and images >= group):
                most, bound = max(images, 1), limit  # of one image the device has the last word
    if bound and most < group:
        most = shared(group, most)
    rows = {name: min(most, group) if name in in_groups else most for name in needs}
    needs = _with_statistics(pipe, needs, [name for name in in_groups if name in rows and rows[name] < group])
    return Plan(most, group, bound, rows, needs, held, memory, 1 + pipe.config.sampling.keep_intermediates)


def network_calls(pipe: "GuidedPipeline", batch: int = 2, images: int = 2) -> dict[str, Call]:
    """The network calls of a pipeline as functions of how many images they hold.

    unet            the denoiser, with two rows an image where classifier-free guidance acts at any step
    decode          latents -> images
    encode          images -> latents, where images are encoded again
    gradient        the guidance gradient, through the UNet where the settings say so
    gradient_1      the same with one row an image, where it is through the UNet and other guided steps have two
    pixel_gradient  the gradient on pixels, of the refinement
    noise_edit      the gradient of L_bn on the initial noise, with the UNet in it

    Where steps differ, the largest counts. batch: images per call; a gradient of more images is taken in several calls,
    and the pass for the group's statistics is among them. images: the most. Nothing random enters.
    """
    config, device = pipe.config.guidance, pipe.device
    latent, side = (pipe.prior.latent_channels, *pipe.latent_size), pipe.image_size

    def points(count: int, shape: tuple[int, ...] = latent) -> Tensor:
        return torch.full((count, *shape), 0.5, device=device)

    packs = {count: pipe.pack(torch.arange(count), 0) for count in {1, 2, images}}  # text is encoded here, with data
    rows = pipe.table.coefficients(points(1), pipe.cfg)
    cfg_rows = packs[1].cfg_rows
    largest = max(range(len(cfg_rows)), key=cfg_rows.__getitem__)
    guided = _guided(pipe)
    for pack in packs.values():
        pack.batch = batch

    def gradient(step: int, count: int) -> object:
        def to_latent(z: Tensor, images: Tensor) -> Tensor:
            return clean_estimate(z, packs[count].denoise(z, step, images), rows[step])

        return packs[count].guide(points(count), step, to_latent if config.gradient == "unet" else None)

    found: dict[str, Call] = {
        "unet": torch.no_grad()(lambda count: packs[count].denoise(points(count), largest)),
        "decode": lambda count: packs[count].decode(points(count)),
    }
    found |= {name: partial(gradient, step) for name, step in guided.items()}
    if (pixels := pipe.pixel_guidance) is not None:
        found["pixel_gradient"] = lambda count: packs[count].gradient(pixels, points(count, (3, side, side)))
    if pipe.reencodings:
        found["encode"] = lambda count: packs[count].restart(points(count, (3, side, side)), pipe.restart)
    if (statistics := pipe.statistics) is not None:
        found["noise_edit"] = lambda count: packs[count].noise_gradient(rows, statistics)(points(count))
    return found


def _calls_of_groups(pipe: "GuidedPipeline") -> tuple[str, ...]:
    """Names of the networks whose calls hold images of one group only, as a loss there ties a group together."""
    guided = {"gradient": pipe.guidance, "gradient_1": pipe.guidance}
    guided |= {"pixel_gradient": pipe.pixel_guidance, "noise_edit": pipe.statistics}
    return tuple(name for name, guidance in guided.items() if guidance is not None and "group" in guidance.needs)


def _guided(pipe: "GuidedPipeline") -> dict[str, int]:
    """By name of a gradient in `network_calls` a denoising step that takes it; {} where the teacher guides none."""
    of_rows = {pipe.cfg_rows(i): i for i in range(len(pipe.table)) if pipe.repeats_at(i)}
    if not of_rows:
        return {}
    least, most = min(of_rows), max(of_rows)
    single = {"gradient_1": of_rows[least]} if pipe.config.guidance.gradient == "unet" and least < most else {}
    return {"gradient": of_rows[most], **single}


def _with_statistics(
    pipe: "GuidedPipeline", needs: Mapping[str, Footprint], cut: Sequence[str]
) -> dict[str, Footprint]:
    """Needs by network; a gradient in `cut`, which takes a group in several calls, has also the FLOP of the pass for
    the group's statistics that comes before."""
    calls = network_calls(pipe, batch=1) if cut else {}
    whole = {name: footprint(calls[name], without_data=pipe.image_size > _SMALL).flop for name in cut}
    return {name: replace(own, flop=whole.get(name, own.flop)) for name, own in needs.items()}


def calls_of_trajectory(pipe: "GuidedPipeline", snapshots: int = 1) -> dict[str, float]:
    """How often a trajectory is in a call of each network, by the names of `network_calls`.

    A call of the UNet without classifier-free guidance, in a run that has calls with it, counts as half a one.
    snapshots: images that come of the trajectory, each decoded.
    """
    own, pack = pipe.config.guidance, pipe.pack(torch.arange(1), 0)
    cfg_rows, repairs = pack.cfg_rows, list(pack.plans) * pipe.config.cutmix.repair
    steps = [*range(len(cfg_rows)), *(list(range(pipe.restart, len(cfg_rows))) * pipe.reencodings)]
    single = [i for i in steps if "gradient_1" in _guided(pipe) and cfg_rows[i] == 1]
    return {
        "unet": sum(cfg_rows[i] for i in (*steps, *repairs)) / max(cfg_rows),
        "decode": snapshots + pipe.reencodings,
        "encode": pipe.reencodings,
        "gradient": sum(map(pipe.repeats_at, steps)) - sum(map(pipe.repeats_at, single)),
        "gradient_1": sum(map(pipe.repeats_at, single)),
        "pixel_gradient": (1 + pipe.reencodings) * own.refine_steps,
        "noise_edit": own.noise_edit_steps,
    }


def needs_of(pipe: "GuidedPipeline") -> dict[str, Footprint]:
    """What the calls of each network need, by the names of `network_calls`, if they hold `pipe.call_size` images."""
    needs = {name: footprint(call, without_data=pipe.image_size > _SMALL) for name, call in network_calls(pipe).items()}
    cut = [name for name in _calls_of_groups(pipe) if name in needs and pipe.call_size < pipe.group]
    return _with_statistics(pipe, needs, cut)


def flop_of_trajectory(pipe: "GuidedPipeline", needs: Mapping[str, Footprint], snapshots: int = 1) -> int:
    """FLOP of the network calls of a trajectory; the teacher's look at finished images is none of them.

    needs: of `needs_of`. snapshots: as of `calls_of_trajectory`.
    """
    calls = calls_of_trajectory(pipe, snapshots)
    return round(sum(own.flop * calls[name] for name, own in needs.items()))


@dataclass(frozen=True)
class Timing:
    """One network's share of a pass: `seconds` a call, so many `calls`, and where the seconds come from.

    A call of the UNet without classifier-free guidance, in a run that has calls with it, counts as half a one.
    """

    seconds: float
    calls: float
    source: str


def predict(pipe: "GuidedPipeline", plan: Plan, image_format: str, made: int = 1) -> dict[str, Timing]:
    """Seconds of a pass by network; `write` is the encoding of its images. What is between the calls is not counted.

    made: images that are made for each that is kept and written.
    """
    counts, doubled = calls_of_trajectory(pipe, plan.snapshots), 1 + pipe.uses_cfg
    engines = {choice.network: choice.key for choice in pipe.choices if choice.key}
    store, found = EngineStore(pipe.config.compute.engines), {}
    for name, needs in plan.needs.items():
        rows = plan.rows[name]
        manifest = store.get(engines[name]) if name in engines else None
        if manifest is not None:
            times, each = manifest.facts["milliseconds"], doubled if name == "unet" else 1
            seconds, source = times["engine"] / 1000 * rows * each / times["rows"], "engine, when it was built"
        else:
            few = rows if pipe.device.type == "cuda" else max(min(rows, int(_TRIAL // max(needs.flop, 1))), 1)
            cut = name in _calls_of_groups(pipe) and rows < plan.group
            seconds, tried = _tried(pipe, name, few, 2 if cut else 1)
            seconds, source = seconds * rows / max(tried, 1), f"tried with {tried}"
        found[name] = Timing(seconds, float(made * counts[name] * -(-plan.trajectories // rows)), source)
    return found | {"write": Timing(_write_seconds(pipe.image_size, image_format), float(plan.images), "tried with 1")}


def _tried(pipe: "GuidedPipeline", name: str, rows: int, parts: int) -> tuple[float, int]:
    """Seconds of a call of `rows` images, or of as many as memory allows, which is the second; (0, 0): of none.

    parts: 2 where a gradient is taken in several calls, whose mean it is.
    """
    while rows:
        call = network_calls(pipe, rows, parts * rows)[name]
        try:
            with calling(name):
                spent = _timed(call, parts * rows, pipe.device)
                if spent < _LONG or pipe.device.type == "cuda":  # a first call sets up, and others may delay it
                    spent = min(spent, _timed(call, parts * rows, pipe.device))
            return spent / parts, rows
        except ShortMemory:
            pass  # here the failed call's tensors are gone
        release(pipe.device)
        rows = halved(rows)
    return 0.0, 0  # sampling will find its rows: a prediction ends no run


def _timed(call: Call, rows: int, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    started = time.perf_counter()
    call(rows)
    wait(device)
    return time.perf_counter() - started


def _write_seconds(side: int, image_format: str) -> float:
    """Seconds that encoding one image takes; size and detail count, and these are a photo's."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (-(-side // 8), -(-side // 8), 3), dtype=np.uint8)
    smooth = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:side, :side]
    image = smooth ^ random.integers(0, 8, smooth.shape, dtype=np.uint8)
    encode(image, image_format)  # the first sets up
    started = time.perf_counter()
    encode(image, image_format)
    return time.perf_counter() - started


def table(plan: Plan, timings: Mapping[str, Timing], images: int) -> list[str]:
    """Lines for people: a plan by network, and the seconds of so many images."""
    rows = [("network", "images a call", "calls a pass", "memory a call", "GFLOP an image", "s a call", "s a pass")]
    for name, timing in timings.items():
        known = ("1", "", "")
        if name in plan.needs:
            known = (str(plan.rows[name]), size(plan.bytes(name)), f"{plan.needs[name].flop / 1e9:.3g}")
        spent = (f"{timing.seconds:.3g}", f"{timing.seconds * timing.calls:.3g}")
        rows.append((name, known[0], f"{timing.calls:.4g}", *known[1:], *spent))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    seconds = seconds_of(plan, timings, images)
    speed = f", {images / seconds:.3g} img/s" if images else ""
    last = f"predicted: {duration(seconds)} for {images} images{speed}; what is between the calls is not counted"
    return [f"{plan.describe()}; {plan.images} images a pass", *("  " + "  ".join(row) for row in aligned), last]


def seconds_of(plan: Plan, timings: Mapping[str, Timing], images: int) -> float:
    """Predicted seconds for `images` images, in whole passes."""
    return -(-images // plan.images) * sum(timing.seconds * timing.calls for timing in timings.values())


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, or of the machine for the CPU (0 where the system does not tell).

    All of it and not what is free: two starts of a run must find the same.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size(count: int) -> str:
    """Bytes such as 3.21 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 20 s, 2 h 5 min, 12 d 3 h."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
