"""A folder of shards as one file per image, for people and for tools that know no shards.

OUT/<class name>/<id:08d>.png (or .jpg, as generated)
OUT/metadata.jsonl            file_name and the whole record, one line per image
OUT/classes.json              {class name: label}: folders sort by name, labels do not
"""

import json
from dataclasses import asdict
from pathlib import Path

from dfkd.errors import UsageError
from dfkd.files import PARTIAL, make_writable, replace_text
from dfkd.data.shards.codec import decode, encode
from dfkd.data.shards.reader import scan


def export_imagefolder(path: Path, out: Path | None = None) -> int:
    """Write the images of the finished folder of shards ``path`` below ``out`` (default: into it); returns how many.

    Each file is whole or absent, and the same every time. Raises UsageError for a damaged or unfinished folder, an
    ``out`` that cannot be written, and class names that cannot be names of folders.
    """
    out = path if out is None else out
    layout, samples = scan(path)
    for name in layout.class_names:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise UsageError(f"class {name!r} cannot be a folder", "it is empty or holds a slash", "use shards instead")
        make_writable(out / name)
    extension = "jpg" if layout.image_format == "jpg" else "png"
    lines = []
    for entry, record in samples:
        data = entry.read()
        if layout.image_format != extension:
            data = encode(decode(data, layout.image_format), extension)
        name = f"{record.class_name}/{record.id:08d}.{extension}"
        _write(out / name, data)
        lines.append(json.dumps({"file_name": name, **asdict(record)}, sort_keys=True))
    replace_text(out / "metadata.jsonl", "".join(f"{line}\n" for line in lines))
    labels = {name: label for label, name in enumerate(layout.class_names)}
    replace_text(out / "classes.json", json.dumps(labels, indent=1) + "\n")
    return len(lines)


def _write(path: Path, data: bytes) -> None:
    # Renamed but not flushed: the shards are the durable copy, and metadata.jsonl is written only after every image.
    beside = path.with_name(path.name + PARTIAL)
    beside.write_bytes(data)
    beside.replace(path)
