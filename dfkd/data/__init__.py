"""Images on disk and in batches.

shards, shard_writer     folders that dfkd-generate writes, with codec for single images
image_files              labelled image files, which class_folders, list_files, parquet_files and array_files list
imagefolder              a class folder is written
folders                  several of these as one pool
batches, views           order, views and form of what training is fed: one contract
loader, dali             three sources of such batches, which give the same
"""

from dfkd.config import VIEWS as KINDS
from dfkd.data.batches import Batch, Encoded, Form, Images, Order, Source, Step, read_all, resize, steps
from dfkd.data.class_folders import list_folder
from dfkd.data.codec import decode, encode
from dfkd.data.dali import installed as dali_installed
from dfkd.data.folders import JoinedImages, match_network, open_data
from dfkd.data.image_files import ImageFiles, Listing, some_names
from dfkd.data.imagefolder import export_imagefolder
from dfkd.data.list_files import list_file
from dfkd.data.loader import LoaderChoice, choose_loader, open_source
from dfkd.data.parquet_files import list_parquet
from dfkd.data.shard_writer import ShardFolder, require_space
from dfkd.data.shards import (
    MANIFEST,
    BadSample,
    Layout,
    Pool,
    Record,
    ShardPool,
    damage_text,
    open_folder,
    read_folder,
    read_manifest,
)
from dfkd.data.views import Views, apply_views, coin, draw

__all__ = [
    "KINDS",
    "MANIFEST",
    "BadSample",
    "Batch",
    "Encoded",
    "Form",
    "ImageFiles",
    "Images",
    "JoinedImages",
    "Layout",
    "Listing",
    "LoaderChoice",
    "Order",
    "Pool",
    "Record",
    "ShardFolder",
    "ShardPool",
    "Source",
    "Step",
    "Views",
    "apply_views",
    "choose_loader",
    "coin",
    "dali_installed",
    "damage_text",
    "decode",
    "draw",
    "encode",
    "export_imagefolder",
    "list_file",
    "list_folder",
    "list_parquet",
    "match_network",
    "open_data",
    "open_folder",
    "open_source",
    "read_all",
    "read_folder",
    "read_manifest",
    "require_space",
    "resize",
    "some_names",
    "steps",
]
