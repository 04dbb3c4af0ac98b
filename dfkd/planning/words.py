"""A plan for people, as a table, and for programs, as plain JSON values."""

from collections.abc import Mapping
from typing import Any

from dfkd.planning.plan import Plan
from dfkd.planning.seconds import Timing, total

_HEAD = ("network", "images a call", "calls a group", "memory a call", "bound by", "s a call", "s a group")
_BOUNDS = {"elements": "2^31 elements", "remembered": "out of memory before (remembered)"}


def in_words(plan: Plan, timings: Mapping[str, Timing], groups: int, images: int) -> str:
    """groups, images: those that are to be computed."""
    rows = [_HEAD]
    for name in {**plan.calls, **timings}:
        call, timing = plan.calls.get(name, plan.calls.get("gradient")), timings.get(name)
        assert call is not None
        cut = (str(call.rows), str(call.calls), size(call.bytes), _BOUNDS.get(call.bound, call.bound))
        spent = (f"{timing.seconds:.3g}", f"{timing.seconds * timing.calls:.3g}") if timing else ("", "")
        rows.append((name, *cut, *spent))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    left = {0, 4}  # words; the others are numbers
    lines = [
        "  "
        + "  ".join(
            text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    memory = f" of {size(plan.memory)}" if plan.memory else ""
    seconds = total(timings, groups)
    speed = f", {images / seconds:.3g} img/s" if images and seconds else ""
    return "\n".join(
        (
            f"plan: groups of {plan.group} images; weights and a group's images take {size(plan.weights)}{memory}",
            *(line.rstrip() for line in lines),
            f"predicted: {duration(seconds)} for {images} images{speed}; what is between the calls is not counted",
        )
    )


def as_json(plan: Plan, timings: Mapping[str, Timing], groups: int, images: int) -> dict[str, Any]:
    seconds = total(timings, groups)
    return {
        "group": plan.group,
        "groups": groups,
        "images": images,
        "memory_bytes": plan.memory or None,
        "held_bytes": plan.weights,
        "calls": {
            name: {
                "images": call.rows,
                "rows": call.rows * (plan.copies if name == "unet" else 1),
                "calls_per_group": call.calls,
                "bytes": call.bytes,
                "bound": call.bound,
            }
            for name, call in plan.calls.items()
        },
        "timings": {
            name: {"seconds": timing.seconds, "calls_per_group": timing.calls, "source": timing.source}
            for name, timing in timings.items()
        },
        "predicted_seconds": round(seconds, 3),
        "predicted_images_per_second": round(images / seconds, 3) if images and seconds else None,
    }


def size(count: int) -> str:
    """Bytes such as 3.21 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Such as 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
