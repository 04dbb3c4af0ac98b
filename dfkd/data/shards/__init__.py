"""Synthetic images on disk: WebDataset tar files and a manifest.

    DIR/manifest.json      version, settings, class_names, image_size, image_format, count, shard_size,
                           shards: [{file, first_id, count, sha256, seconds}]
    DIR/shard-00000.idx    where each file of the shard begins, as DALI's reader wants to know: index.py
    DIR/shard-00000.tar    <id:08d>.png|jpg|npy (pixels), <id:08d>.cls (label), <id:08d>.json (record), ids ascending

The shard is the unit of commit: it is written beside, flushed, renamed, and counts once the manifest has its hash.
Its bytes are a function of its images and records alone (no time, owner or order of dictionaries), so a run that was
killed and started again ends with the same bytes as one that was not.
"""

from dfkd.data.shards.layout import Layout, Record, read_manifest
from dfkd.data.shards.reader import Pool, ShardPool, open_folder, read_folder
from dfkd.data.shards.space import require_space, required_bytes
from dfkd.data.shards.writer import ShardFolder

__all__ = [
    "Layout",
    "Pool",
    "Record",
    "ShardFolder",
    "ShardPool",
    "open_folder",
    "read_folder",
    "read_manifest",
    "require_space",
    "required_bytes",
]
