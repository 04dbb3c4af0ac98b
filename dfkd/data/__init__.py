"""Images on disk and in batches: shards, class folders, and the loaders of training."""

from dfkd.config import VIEWS as KINDS
from dfkd.data.image_files import ImageFiles, Listing
from dfkd.data.image_files import decode as decode_files
from dfkd.data.image_files import read_folder as list_folder
from dfkd.data.image_files import read_list as list_file
from dfkd.data.image_files import read_parquet as list_parquet
from dfkd.data.imagefolder import export_imagefolder
from dfkd.data.loader.choice import LoaderChoice, open_source
from dfkd.data.loader.choice import choose as choose_loader
from dfkd.data.loader.contract import Batch, Form, Images, Source
from dfkd.data.loader.dali import installed as dali_installed
from dfkd.data.loader.order import Order, Step, steps
from dfkd.data.loader.pixels import read_all, resize
from dfkd.data.loader.views import Views, coin, draw
from dfkd.data.loader.views import apply as apply_views
from dfkd.data.shards.codec import decode, encode
from dfkd.data.shards.damage import BadSample
from dfkd.data.shards.damage import in_words as damage_text
from dfkd.data.shards.layout import MANIFEST, Layout, Record, read_manifest
from dfkd.data.shards.reader import Pool, ShardPool, open_folder, read_folder, scan
from dfkd.data.shards.space import require_space
from dfkd.data.shards.writer import ShardFolder

__all__ = [
    "KINDS",
    "MANIFEST",
    "BadSample",
    "Batch",
    "Form",
    "ImageFiles",
    "Images",
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
    "decode_files",
    "draw",
    "encode",
    "export_imagefolder",
    "list_file",
    "list_folder",
    "list_parquet",
    "open_data",
    "open_folder",
    "open_source",
    "read_all",
    "read_folder",
    "read_manifest",
    "require_space",
    "resize",
    "scan",
    "steps",
]


def open_data(paths, on_bad_sample="fail"):  # type: ignore[no-untyped-def]  # replaced in a moment
    return open_folder(*paths, on_bad_sample)
