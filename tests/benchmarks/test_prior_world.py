"""World Y as folders: what the preset demo-prior learns from, in the order of the digits."""

from pathlib import Path

from benchmarks.prior_world import CLASS_NAMES, write_folders
from dfkd.evaluation import open_splits


def test_its_folders_are_data_of_the_commands(tmp_path: Path) -> None:
    write_folders(tmp_path, 60)
    digits = open_splits(f"imagefolder:{tmp_path}/digits", 32, splits=("train", "validation"))
    assert digits["train"].class_names == CLASS_NAMES
    textures = open_splits(f"imagefolder:{tmp_path}/autoencoder", 32, splits=("train",))["train"]
    assert textures.class_names == ("digits", "textures")
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 60
    assert len(list((tmp_path / "autoencoder").rglob("*.png"))) == 40
