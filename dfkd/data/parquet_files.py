"""Parquet files of images in Hugging Face's layout: a column of encoded images, and one of labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd.data.class_folders import natural_order
from dfkd.data.image_files import Listing, Source
from dfkd.data.list_files import numbered
from dfkd.errors import UsageError

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")
WANTED = f"wanted are a column {' or '.join(IMAGES)} of image{{bytes, path}} and one {' or '.join(LABELS)}"


def list_parquet(files: Sequence[Path]) -> Listing:
    """All images of some Parquet files of one schema.

    Class names come from the Hugging Face schema, or are the labels where these are words, else numbers. Raises
    UsageError: no file, no such columns, a row without an image or a label, labels outside the names, no pyarrow.
    """
    parquet = _pyarrow(files)
    images: list[Source] = []
    labels: list[Any] = []
    names: list[str] = []
    place = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    for file in files:
        try:
            table = parquet.read_table(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} is no Parquet file", str(error).partition("\n")[0]) from None
        image, label = (_column(file, table.column_names, known) for known in (IMAGES, LABELS))
        names = names or _schema_names(table.schema.metadata, label)
        images += [_source(file, row) for row in table.column(image).to_pylist()]
        labels += table.column(label).to_pylist()
    lacking = [row for row, (one, other) in enumerate(zip(images, labels, strict=True)) if not one or other is None]
    if lacking:
        raise UsageError(f"{place}: {len(lacking)} rows have no image or no label", f"the first is row {lacking[0]}")
    if words := {label for label in labels if isinstance(label, str)}:
        names = natural_order(words)
        places = {name: place for place, name in enumerate(names)}
        labels = [places[label] for label in labels]
    elif not all(isinstance(label, int) for label in labels):
        raise UsageError(f"{place}: a label is {labels[0]!r}", "labels are numbers of classes or their names")
    return numbered(images, labels, dict(enumerate(names)), place)


def parquet_names(files: Sequence[Path]) -> tuple[str, ...]:
    """The class names in the schema of the first file, () where it has none; reads no image."""
    schema = _pyarrow(files).read_schema(files[0])
    return tuple(_schema_names(schema.metadata, _column(files[0], schema.names, LABELS)))


def _pyarrow(files: Sequence[Path]) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"cannot read {files[0]}", "pyarrow is not installed", "pip install pyarrow") from error
    return parquet


def _column(file: Path, columns: Sequence[str], known: Sequence[str]) -> str:
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise UsageError(f"{file} has no column {known[0]}", f"it has {', '.join(columns)}; {WANTED}")
    return found


def _source(file: Path, row: Any) -> Source:
    """Encoded bytes, or the file that the row names instead; b"" for neither."""
    if isinstance(row, dict):
        path = row.get("path")
        return row.get("bytes") or (file.parent / path if path else b"")
    return row if isinstance(row, bytes) else b""


def _schema_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str]:
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list((features.get(label) or {}).get("names") or [])
