"""A result of the suite as tables: for a terminal, a table a group, and for the documents one."""

from itertools import groupby
from typing import Any

from benchmarks.suite.compare import compare, in_words, number

BASELINE = "baseline"


def terminal(result: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """Lines. before: a result to stand beside it."""
    changes = {(c.group, c.name): c for c in compare(before, result)} if before else {}
    skipped = {(s["group"], s["name"]): s["why"] for s in result["skipped"]}
    order = dict.fromkeys([r["group"] for r in (*result["rows"], *result["skipped"])])
    lines: list[str] = []
    for group in order:
        rows = [r for r in result["rows"] if r["group"] == group]
        heads = ["", "ms: median (min to max)", "ratio", *(["ratio before", ""] if before else [])]
        table = [[*heads, "a second"]]
        for r in rows:
            cells = [r["name"], in_words(r["milliseconds"]), _ratio(r)]
            if before:
                change = changes.get((group, r["name"]))
                cells += [in_words(change.before), change.verdict] if change else ["", ""]
            table.append([*cells, _rate(r)])
        lines += ["", group, *_aligned(table)]
        lines += [f"  {name}: not measured: {why}" for (of, name), why in skipped.items() if of == group]
    return [*lines, "", _under(result)]


def markdown(result: dict[str, Any]) -> str:
    """One table, and below it what was not measured."""
    lines = ["| group | row | ms: median (min to max) | ratio | a second |", "|---|---|---|---|---|"]
    for r in result["rows"]:
        cells = [r["group"], r["name"], in_words(r["milliseconds"]), _ratio(r), _rate(r)]
        lines.append("| " + " | ".join(cells) + " |")
    command = "make bench" if result["suite"] == "full" else "make bench ARGS=--quick"
    lines += ["", f"Ratio: times as fast as the group's baseline in the same rounds. {_under(result)}: `{command}`."]
    if result["skipped"]:
        lines += ["", "Not measured:", ""]
        for why, of in groupby(sorted(result["skipped"], key=lambda s: s["why"]), lambda s: s["why"]):
            names = ", ".join(f"{s['group']}: {s['name']}" for s in of)
            lines.append(f"- {names}: {why}")
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    return BASELINE if row["baseline"] else in_words(row["ratio"])


def _rate(row: dict[str, Any]) -> str:
    if "images_per_second" in row:
        return f"{number(row['images_per_second'])} images"
    if "bytes_per_second" not in row:
        return "-"
    value = row["bytes_per_second"]
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    return f"{number(value / size)} {prefix}B"


def _under(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return (
        f"{result['suite'].capitalize()} suite, {result['rounds']} rounds a row, {machine['device']}, "
        f"{machine['cores']} cores (load {result['load']} before it began), {machine['threads']} threads, {versions}, "
        f"Python {machine['python']}, {machine['date']}"
    )


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in table]
