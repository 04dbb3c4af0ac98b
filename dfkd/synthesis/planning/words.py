"""A plan for people, as a table, and for programs, as plain JSON values."""

from collections.abc import Mapping
from typing import Any

from dfkd.synthesis.planning.elsewhere import LAUNCH, REACHED, Elsewhere
from dfkd.synthesis.planning.plan import Plan
from dfkd.synthesis.planning.seconds import Timing, total
from dfkd_engine.planner import CallPlan
from dfkd_engine.work import Work

_CALL = ("network", "images a call", "calls a group", "memory a call", "bound by")
_SPENT = ("s a call", "s a group")
_WORK = ("GFLOP an image", "GB an image")
_BOUNDS = {"elements": "2^31 elements", "remembered": "out of memory before (remembered)"}


def in_words(
    plan: Plan, timings: Mapping[str, Timing], groups: int, images: int, work: Mapping[str, Work] | None = None
) -> str:
    """groups, images: those that are to be computed. work: of a group, by network, where it was counted."""
    rows: list[tuple[str, ...]] = [(*_CALL, *_SPENT, *(_WORK if work else ()))]
    for name in {**plan.calls, **timings}:
        timing = timings.get(name)
        spent = (f"{timing.seconds:.3g}", f"{timing.seconds * timing.calls:.3g}") if timing else ("", "")
        rows.append((name, *_cut(_call_of(name, plan)), *spent, *(_amount(work.get(name), plan) if work else ())))
    memory = f" of {size(plan.memory)}" if plan.memory else ""
    seconds = total(timings, groups)
    speed = f", {images / seconds:.3g} img/s" if images and seconds else ""
    return "\n".join(
        (
            f"plan: groups of {plan.group} images; weights and a group's images take {size(plan.weights)}{memory}",
            *_table(rows),
            f"predicted: {duration(seconds)} for {images} images{speed}; what is between the calls is not counted",
        )
    )


def elsewhere_in_words(found: Elsewhere, images: int) -> str:
    """The plan for GPUs that are not here, and how long it takes there."""
    plan, sheet = found.plan, found.sheet
    rows: list[tuple[str, ...]] = [(*_CALL, *_WORK)]
    rows += [(name, *_cut(_call_of(name, plan)), *_amount(part, plan)) for name, part in found.work.items()]
    floor, eager = (duration(found.floor(images, fused)) for fused in (True, False))
    low, high = map(duration, found.predicted(images))
    each = "each " if found.devices > 1 else ""
    shares = " to ".join(f"{100 * share:.0f}" for share in REACHED)
    return "\n".join(
        (
            f"plan for {found.devices} {sheet.name}, {each}{sheet.bandwidth / 1e12:g} TB/s, {sheet.memory / 1e9:g} GB:"
            f" groups of {plan.group} images; weights and a group's images take {size(plan.weights)}",
            *_table(rows),
            f"no less than {floor} for {images} images at the data sheet's ceilings; eagerly no less than {eager}",
            f"predicted: {low} to {high} compiled, a forecast: {shares} % of the ceilings, {1e6 * LAUNCH:g} us a launch"
            f", and {duration(found.write_seconds(images))} of writing by a CPU as this one",
        )
    )


def _call_of(name: str, plan: Plan) -> CallPlan | None:
    """A gradient's calls are those of `gradient`; what is no network has none."""
    return None if name == "write" else plan.calls.get(name, plan.calls.get("gradient"))


def _cut(call: CallPlan | None) -> tuple[str, ...]:
    if call is None:
        return ("1", "", "", "")
    return str(call.rows), str(call.calls), size(call.bytes), _BOUNDS.get(call.bound, call.bound)


def _amount(work: Work | None, plan: Plan) -> tuple[str, str]:
    if work is None:
        return "", ""
    return f"{work.flop / plan.group / 1e9:.3g}", f"{work.bytes / plan.group / 1e9:.3g}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 4}  # words; the others are numbers
    return [
        "  "
        + "  ".join(
            text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_json(
    plan: Plan, timings: Mapping[str, Timing], groups: int, images: int, work: Mapping[str, Work] | None = None
) -> dict[str, Any]:
    """As in_words."""
    seconds = total(timings, groups)
    amount = {"work": work_as_json(work, plan)} if work else {}
    return {
        "group": plan.group,
        "groups": groups,
        "images": images,
        "memory_bytes": plan.memory or None,
        "held_bytes": plan.weights,
        "calls": _calls_as_json(plan),
        "timings": {
            name: {"seconds": timing.seconds, "calls_per_group": timing.calls, "source": timing.source}
            for name, timing in timings.items()
        },
        **amount,
        "predicted_seconds": round(seconds, 3),
        "predicted_images_per_second": round(images / seconds, 3) if images and seconds else None,
    }


def elsewhere_as_json(found: Elsewhere, images: int) -> dict[str, Any]:
    """As elsewhere_in_words."""
    return {
        "devices": found.devices,
        "device": found.sheet.name,
        "images": images,
        "group": found.plan.group,
        "calls": _calls_as_json(found.plan),
        "work": work_as_json(found.work, found.plan),
        "floor_seconds": found.floor(images, fused=True),
        "eager_floor_seconds": found.floor(images, fused=False),
        "predicted_seconds": found.predicted(images),
        "write_seconds": found.write_seconds(images),
    }


def work_as_json(work: Mapping[str, Work], plan: Plan) -> dict[str, Any]:
    """Of an image, by network."""
    return {
        name: {"flop": round(part.flop / plan.group), "bytes": round(part.bytes / plan.group)}
        for name, part in work.items()
    }


def _calls_as_json(plan: Plan) -> dict[str, Any]:
    return {
        name: {
            "images": call.rows,
            "rows": call.rows * (plan.copies if name == "unet" else 1),
            "calls_per_group": call.calls,
            "bytes": call.bytes,
            "bound": call.bound,
        }
        for name, call in plan.calls.items()
    }


def size(count: int) -> str:
    """Bytes such as 3.21 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Such as 4.2 s, 3 min 20 s, 2 h 5 min, 12 d 3 h."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
