"""dfkd-generate that keeps some of its images: what it says, what it counts, what it refuses."""

import json

from tests.cli.small_generate import last_line


def test_what_is_left_out_is_counted_and_a_lost_class_is_said(call, tmp_path, capfd):
    """To this teacher nearly all noise is of one class."""
    out = tmp_path / "out"
    assert call("--out", out, "--method", "noise", "--filter-views", 3, "--count", 9, "--format", "imagefolder") == 0
    streams = capfd.readouterr()
    result = last_line(streams.out)
    dropped, kept = result["dropped"], sum(result["class_counts"])
    assert result["images"] == 9 == dropped + kept and kept > 0
    lost = [name for name, count in zip(result["class_names"], result["class_counts"], strict=True) if not count]
    assert lost and f"filter: {dropped} of 9 images are left out of training, and stay in their shards" in streams.err
    assert f"WARNING: no image is left of {', '.join(lost)}: a student will not learn them" in streams.err
    assert f"9 images of 3 classes, {dropped} of them left out by the filter; preview.png" in streams.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(len(shard["dropped"]) for shard in manifest["shards"]) == dropped
    assert len(list((out / "imagefolder").rglob("*.png"))) == kept


def test_all_are_left_out(call, tmp_path, capfd):
    assert call("--out", tmp_path, "--method", "noise", "--filter-views", 3, "--only", "one") == 2
    assert "none of the 4 images of" in capfd.readouterr().err
    assert (tmp_path / "shard-00000.tar").exists()


def test_a_plan_of_candidates_takes_their_seconds(call, tmp_path, capfd):
    seconds = []
    for more in ([], ["--candidates", 3]):
        assert call("--out", tmp_path / "out", "--count", 64, "--plan-only", *more) == 0
        seconds.append(last_line(capfd.readouterr().out)["plan"]["timings"]["unet"]["calls"])
    assert seconds[1] == 3 * seconds[0]


def test_a_plan_of_step_trials_takes_their_trajectories(call, tmp_path, capfd):
    """Of each length 32 trajectories, whose images count as if several came of each."""
    for more, images in ([], 96), (["--keep-intermediates", 1], 192):
        argv = ("--count", 64, "--group", 4, "--step-trials", 3, "--plan-only", *more)
        assert call("--out", tmp_path / "out", *argv) == 0
        assert f"of these images {images} stand for those of --step-trials" in capfd.readouterr().err
