"""The waterfall's result as a table, a sentence and a picture; and the product of its gains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

KINDS = {
    "start": ("#5b6675", "the published loop"),
    "fixed": ("#1f5fd6", "the same images, faster"),
    "algorithm": ("#d9730d", "another algorithm"),
}
INK = "#1c2430"


def products(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Gains multiplied: of rows with the same images, of rows with others, and together: the last over the first."""
    found = {kind: math.prod(row["gain"] for row in rows if row["kind"] == kind) for kind in ("fixed", "algorithm")}
    return found | {"together": rows[-1]["images_per_second"] / rows[0]["images_per_second"]}


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a recorded result, and what its gains multiply to."""
    lines = [
        "| row | kind | at a time | img/s: median (min to max) | gain (by turn) | so far | pixels | cosine | student |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = result["rows"][0]["images_per_second"]
    for row in result["rows"]:
        cells = [
            f"{row['name']}: {row['what']}",
            row["kind"],
            row["images_at_a_time"],
            f"{row['images_per_second']:.2f} ({row['slowest']:.2f} to {row['fastest']:.2f})",
            f"x {row['gain']:.2f} ({row['gain_low']:.2f} to {row['gain_high']:.2f})" if "gain" in row else "",
            f"{row['images_per_second'] / first:.1f}",
            f"{row['pixel_difference']:.3f}" if "pixel_difference" in row else "",
            "" if row["gradient_cosine"] is None else f"{row['gradient_cosine']:.2f}",
            _student(row),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    machine, engines, product = result["machine"], result["engines"], result["products"]
    lines += [
        "",
        f"Fixed-algorithm x {product['fixed']:.1f}, algorithmic x {product['algorithm']:.1f}, together "
        f"x {product['together']:.1f}.",
        "",
        "so far: times the first row; pixels: mean absolute difference to the images of the row before, of 255; "
        "cosine: of the gradient with the published one, over the steps in which the row guides; student: test "
        f"accuracy, and of which row's images. {result['steps']} steps, {result['turns']} turns; engines: "
        f"{_built(engines)}. "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}: "
        "`python -m benchmarks.waterfall --students`.",
    ]
    return "\n".join(lines)


def document(result: Mapping[str, Any]) -> str:
    """The table with the picture above it."""
    return f"![Images per second, a technique a row](../benchmarks/results/waterfall-cpu.png)\n\n{markdown(result)}"


def sentence(result: Mapping[str, Any]) -> str:
    """The waterfall in one line, for the README."""
    first, last, product = result["rows"][0], result["rows"][-1], result["products"]
    student = ""
    if last["student_accuracy"] is not None:
        student = f"; its student reaches {_percent(last)}, the published loop's {_percent(first)}"
    return (
        f"The demo makes {last['images_per_second']:.1f} images a second end to end, the published loop "
        f"{first['images_per_second']:.2f}: x {product['together']:.1f}, of which x {product['fixed']:.1f} with the "
        f"same images and x {product['algorithm']:.1f} by another algorithm{student}. "
        "[docs/waterfall.md](docs/waterfall.md) has it technique by technique."
    )


def plot(result: Mapping[str, Any], out: BinaryIO) -> None:
    """The rows as bars on a logarithmic axis, as a PNG."""
    # Imported here and not above: matplotlib takes a second to load, and tables need no picture.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows, places = result["rows"], range(len(result["rows"]))
    figure = Figure(figsize=(8.2, 0.36 * len(rows) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    speeds = [row["images_per_second"] for row in rows]
    start = 10 ** math.floor(math.log10(min(speeds)) - 0.01)
    axes.barh(places, [s - start for s in speeds], left=start, height=0.68, color=[KINDS[r["kind"]][0] for r in rows])
    axes.set_xscale("log")
    axes.set_xlim(start, max(speeds) * 4)
    for place, row in zip(places, rows, strict=True):
        words = [f"{row['images_per_second']:.3g}"]
        words += [f"x {row['gain']:.2f}"] if "gain" in row else []
        if row["student_accuracy"] is not None and row["kind"] != "fixed":
            words.append(f"student {_percent(row)}")
        axes.text(row["images_per_second"] * 1.04, place, "   ".join(words), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("images per second, sampled and written", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    patches = [Patch(color=color, label=label) for color, label in KINDS.values()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})


def _student(row: Mapping[str, Any]) -> str:
    if row["student_accuracy"] is None:
        return "not run"
    return _percent(row) if row["student_of"] == row["name"] else f"{_percent(row)} ({row['student_of']})"


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['student_accuracy']:.1f} %"


def _built(engines: Mapping[str, Any]) -> str:
    if not engines["backends"]:
        return "none built"
    counts = f"{engines['built']} built in {engines['seconds']:.0f} s"
    return counts + (f", {engines['current']} were there" if engines["current"] else "")
