"""Engines in words and columns."""

from collections.abc import Sequence


def shown(value: str) -> str:
    """A recipe's value for people: digests cut short."""
    return value[:12] if len(value) == 64 and all(c in "0123456789abcdef" for c in value) else value


def causes(differences: Sequence[tuple[str, str, str]]) -> list[str]:
    """Why an engine is not current, of `EngineStore.explain`: a phrase a field, or one for what was never built."""
    fields = [field for field, _, _ in differences]
    if fields == ["network"]:
        return ["it was not built yet"]
    if "flags.quantise" in fields:
        return ["it was not built with this --quantise yet"]
    if "backend" in fields:
        return ["it was not built with this backend yet"]
    if fields[:1] == ["engine"]:
        return [f"it is damaged: {differences[0][1]}"]
    return [f"{field} was {shown(there)} and is {shown(here)}" for field, there, here in differences]


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first of them the heads."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
