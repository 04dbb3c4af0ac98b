"""A folder of shards as one file per image, for people and for tools that know no shards.

OUT/<class name>/<id:08d>.png (or .jpg, as generated)
OUT/metadata.jsonl            file_name and the whole record, one line per image
OUT/classes.json              {class name: label}: folders sort by name, labels do not
"""

import json
from pathlib import Path

import torch

from dfkd.data.codec import decode, encode
from dfkd.data.shards import open_folder
from dfkd.errors import UsageError
from dfkd.files import PARTIAL, make_writable, replace_text


def export_imagefolder(path: Path, out: Path | None = None) -> int:
    """Write the images of the finished folder of shards ``path`` below ``out`` (default: path/imagefolder); returns
    how many.

    Each file is whole or absent, and the same every time. A folder that already holds this export is left alone, so
    that what someone took out of it stays out. Raises UsageError for damaged or unfinished shards, an ``out`` that
    cannot be written, and class names that cannot be names of folders.
    """
    out = path / "imagefolder" if out is None else out
    pool = open_folder(path)
    for name in pool.class_names:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise UsageError(f"class {name!r} cannot be a folder", "it is empty or holds a slash", "use shards instead")
    image_format = pool.layout.image_format
    extension = "jpg" if image_format == "jpg" else "png"
    described = {f"{record.class_name}/{record.id:08d}.{extension}": record.to_json() for record in pool.records()}
    lines = [json.dumps({"file_name": name, **record}, sort_keys=True) + "\n" for name, record in described.items()]
    make_writable(out)
    metadata = out / "metadata.jsonl"
    if metadata.exists() and metadata.read_text(encoding="utf-8") == "".join(lines):
        return len(lines)
    for name in pool.class_names:
        (out / name).mkdir(exist_ok=True)
    for position, name in enumerate(described):
        (data,) = pool.encoded(torch.tensor([position]))
        content = data.tobytes()
        if image_format != extension:
            content = encode(decode(content, image_format), extension)
        # Renamed but not flushed: the shards are the durable copy, and metadata.jsonl comes after every image.
        beside = out / (name + PARTIAL)
        beside.write_bytes(content)
        beside.replace(out / name)
    labels = {name: label for label, name in enumerate(pool.class_names)}
    replace_text(out / "classes.json", json.dumps(labels, indent=1) + "\n")
    replace_text(metadata, "".join(lines))
    return len(lines)
