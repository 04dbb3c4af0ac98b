"""generate(): calls of whole groups into shards; what is missing and nothing else; call size and threads on record."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

import dfkd
from dfkd.config import GenerateConfig, LoggingConfig
from dfkd.data import Record, read_folder
from dfkd.errors import UsageError
from dfkd.synthesis.run import generate, identity_of, shard_size
from dfkd.synthesis.synthesizer import Synthesizer
from dfkd.synthesis.watch import measured
from tests.synthesis.tinted import Tinted

ROOT = Path(__file__).resolve().parents[2]
CONFIG = GenerateConfig.of(batch=8, group=4, shard_size=16, threads=1)


def shards_of(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("shard-*"))}


def run_of(path):
    return json.loads((path / "manifest.json").read_text())["run"]


def made(path, count=30, seed=7, config=CONFIG, synthesizer=None, **more):
    """The synthesizer, after a run on the folder."""
    synthesizer = synthesizer or Tinted()
    generate(synthesizer, path, count, seed, config=config, **more)
    return synthesizer


def test_images_labels_records_and_progress(tmp_path):
    seen, said = [], []
    synthesizer = Tinted()
    assert isinstance(synthesizer, Synthesizer) and dfkd.generate is generate
    pool = generate(synthesizer, tmp_path, 30, 7, lambda *done: seen.append(done), CONFIG, said.append)
    assert pool.labels.tolist() == [i % 3 for i in range(30)] and pool.class_names == ("zero", "one", "two")
    assert pool.read(torch.tensor([5, 29]))[:, 0, 0, 0].tolist() == [5, 29]
    assert seen == [(0, 30), (8, 30), (16, 30), (24, 30), (30, 30)]
    records = read_folder(tmp_path).records
    assert [(r.id, r.label, r.class_name, r.seed) for r in records[:2]] == [(0, 0, "zero", 7), (1, 1, "one", 7)]
    assert run_of(tmp_path) == {"call_size": 8, "threads": 1}
    assert said == ["30 images of 4x4, 30 to make: calls of 8, groups of 4, 1 threads"]


@pytest.mark.parametrize(
    "group, batch, shard, calls",
    [
        (1, 3, 8, [(0, 3), (3, 3), (6, 2), (8, 3), (11, 3), (14, 2), (16, 3), (19, 1)]),  # a shard ends a call
        (4, 8, 8, [(0, 8), (8, 8), (16, 4)]),  # two groups a call
        (4, 6, 8, [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4)]),  # whole groups alone
        (4, 2, 8, [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4)]),  # one at least
        (1, 512, 0, [(0, 20)]),  # a shard is no smaller than a call
        (8, 12, 0, [(0, 8), (8, 8), (16, 4)]),
    ],
)
def test_calls_hold_whole_groups_and_end_with_their_shard(tmp_path, group, batch, shard, calls):
    config = GenerateConfig.of(batch=batch, group=group, shard_size=shard)
    assert made(tmp_path, 20, config=config, synthesizer=Tinted(group)).calls == calls


@pytest.mark.parametrize("group, batch, shard", [(4, 64, 256), (1, 512, 512), (100, 64, 300), (64, 192, 384)])
def test_a_shard_holds_about_256_images_in_whole_calls(tmp_path, group, batch, shard):
    made(tmp_path, 2, config=GenerateConfig.of(batch=batch, group=group), synthesizer=Tinted(group))
    assert json.loads((tmp_path / "manifest.json").read_text())["shard_size"] == shard


@pytest.mark.parametrize("group, part, shard", [(4, 100, 100), (4, 600, 200), (7, 7 * 331, 7), (300, 600, 300)])
def test_a_shard_ends_with_a_part(tmp_path, group, part, shard):
    assert shard_size(Tinted(group), GenerateConfig(), tmp_path, 64, part) == shard


def test_parts_that_hold_no_whole_groups_or_shards_are_refused(tmp_path):
    with pytest.raises(UsageError, match="phases of 10 images cannot be used: tinted makes images in groups of 4"):
        shard_size(Tinted(4), GenerateConfig(), tmp_path, 64, 10)
    with pytest.raises(UsageError, match="--shard-size 16 cannot be used: each phase has 24 images"):
        shard_size(Tinted(4), CONFIG, tmp_path, 64, 24)
    made(tmp_path, 2, config=GenerateConfig(), synthesizer=Tinted(4))
    with pytest.raises(UsageError, match="was begun with shards of 256 images: each phase has 24, and"):
        shard_size(Tinted(4), GenerateConfig(), tmp_path, 64, 24)  # whose images another phase would have too
    assert shard_size(Tinted(4), GenerateConfig(), tmp_path, 64, 512) == 256


def test_started_again_it_makes_what_is_missing_or_damaged(tmp_path):
    made(tmp_path)
    before = shards_of(tmp_path)
    assert made(tmp_path).calls == []
    (tmp_path / "shard-00001.tar").unlink()
    assert made(tmp_path).calls == [(16, 8), (24, 6)] and shards_of(tmp_path) == before
    damaged = bytearray(before["shard-00000.tar"])
    damaged[700] ^= 1
    (tmp_path / "shard-00000.tar").write_bytes(damaged)
    assert made(tmp_path).calls == [(0, 8), (8, 8)] and shards_of(tmp_path) == before


class Killed(BaseException):
    pass


def log_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_every_shard_is_told_and_shown(tmp_path):
    shown = []

    def look(ids):
        preview = tmp_path / "preview.png"
        shown.append((ids[0], Image.open(preview).size if preview.exists() else None))

    made(tmp_path, 36, synthesizer=Tinted(before=look))
    assert [first for first, size in shown if size is None] == [0, 8]  # before the first shard was written
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [16, 32, 36] and all(line["images_per_second"] > 0 for line in lines)
    (tmp_path / "shard-00001.tar").unlink()
    made(tmp_path, 36)
    assert [line["step"] for line in log_of(tmp_path)] == [16, 36]  # what is made again is told again
    before = (tmp_path / "log.jsonl").read_text()
    made(tmp_path, 36)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_shards_numbers():
    records = [Record(i, 0, "zero", 7, "", losses={"bn": 2.0 * i, "cls": 1.0}, teacher_probability=i) for i in (0, 1)]
    assert measured(records, 0.5) == {"teacher_probability": 0.5, "bn": 1.0, "cls": 1.0, "images_per_second": 4}


def test_a_call_tells_how_far_it_is(tmp_path):
    """The hook is gone after the run: the synthesizer may be called again by itself."""

    class Telling(Tinted):
        on_progress = None

        def __call__(self, ids, labels=None, seed=0):
            self.on_progress(0.25)
            return super().__call__(ids, labels, seed)

    seen = []
    synthesizer = made(tmp_path, 12, synthesizer=Telling(), progress=lambda *done: seen.append(done))
    assert seen == [(0, 12), (2, 12), (8, 12), (9, 12), (12, 12)] and synthesizer.on_progress is None


def test_logs_whose_package_is_absent_are_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--tensorboard needs the package tensorboard"):
        made(tmp_path / "out", logging=LoggingConfig(tensorboard=True))
    assert not (tmp_path / "out").exists()


def kill_at(image):
    def before(ids):
        if image in ids:
            raise Killed

    return before


def test_a_continued_run_keeps_call_size_and_threads_whatever_it_is_asked(tmp_path):
    made(tmp_path / "whole", 60)
    with pytest.raises(Killed):
        made(tmp_path / "killed", 60, synthesizer=Tinted(before=kill_at(40)))
    assert [name for name in shards_of(tmp_path / "killed") if name.endswith("tar")] == [
        "shard-00000.tar",
        "shard-00001.tar",
    ]
    said = []
    other = CONFIG.replace(batch=4, threads=2, shard_size=0)
    continued = made(tmp_path / "killed", 60, config=other, say=said.append)
    assert continued.calls == [(32, 8), (40, 8), (48, 8), (56, 4)]
    assert said == ["60 images of 4x4, 28 to make: calls of 8, groups of 4, 1 threads, as the folder was begun"]
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert run_of(tmp_path / "killed") == run_of(tmp_path / "whole")


def test_threads_are_set_for_the_run_alone(tmp_path):
    before = torch.get_num_threads()
    made(tmp_path, 4, config=CONFIG.replace(threads=before + 1))
    assert torch.get_num_threads() == before
    assert read_folder(tmp_path).images[0, 2, 0, 0] == before + 1


def test_engines_are_loaded_with_the_runs_threads(tmp_path):
    """ONNX Runtime takes the number over as it loads an engine; a continued folder has it on record."""
    found = []

    class WithEngines(Tinted):
        def use_engines(self, before):
            found.append((torch.get_num_threads(), before))
            return {"unet": "key"}

    threads = torch.get_num_threads() + 1
    made(tmp_path, 4, synthesizer=WithEngines(), config=CONFIG.replace(threads=threads))
    made(tmp_path, 4, synthesizer=WithEngines(), config=CONFIG.replace(threads=threads + 1))
    assert found == [(threads, None), (threads, {"unet": "key"})]


@pytest.mark.parametrize(
    "cuts, fits, sizes, calls",
    [
        (False, 4, [8, 4], [(0, 8), (0, 4), (4, 4), (8, 4), (12, 4)]),  # the images that failed are made again
        (False, 8, [8], [(0, 8), (8, 8)]),
        (True, 2, [8, 4, 2], [(0, 8), (0, 4), (0, 4), (4, 4), (8, 4), (12, 4)]),  # groups stay whole, calls are cut
    ],
)
def test_short_memory_halves_the_calls_and_is_on_record(tmp_path, cuts, fits, sizes, calls):
    said = []
    synthesizer = made(tmp_path, 16, synthesizer=Tinted(cuts=cuts, fits=fits), say=said.append)
    assert synthesizer.calls == calls and run_of(tmp_path)["call_size"] == sizes[-1]
    for line, pair in zip(said[1:], pairwise(sizes), strict=True):
        assert line.startswith("tinted: out of memory in calls of {} images (CUDA out of memory. ".format(*pair))
        assert line.endswith("; again with {1}, recorded".format(*pair))
    assert read_folder(tmp_path).images[:, 0, 0, 0].tolist() == list(range(16))
    (tmp_path / "shard-00000.tar").unlink()
    assert made(tmp_path, 16, synthesizer=Tinted(cuts=cuts)).calls[0] == (0, calls[-1][1])


def test_memory_that_holds_no_group_ends_in_words(tmp_path):
    with pytest.raises(UsageError, match=r"a call of tinted runs out of memory with 4 images.*smaller --group"):
        made(tmp_path, synthesizer=Tinted(fits=3))
    with pytest.raises(UsageError, match="a call of tinted runs out of memory with 1 image: CUDA out"):
        made(tmp_path, synthesizer=Tinted(cuts=True, fits=0))
    assert not shards_of(tmp_path)


def test_other_errors_are_not_taken_for_short_memory(tmp_path):
    def broken(ids):
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        made(tmp_path, synthesizer=Tinted(before=broken))


def test_a_run_has_an_image(tmp_path):
    with pytest.raises(UsageError, match="count is 0: it must be at least 1"):
        generate(Tinted(), tmp_path, 0)


def test_a_folder_takes_images_of_one_identity(tmp_path):
    made(tmp_path)
    before = shards_of(tmp_path)
    with pytest.raises(UsageError, match="seed is 7 there and 8 here"):
        made(tmp_path, seed=8)
    with pytest.raises(UsageError, match="shade is 0 there and 1 here"):
        made(tmp_path, synthesizer=Tinted(shade=1))
    with pytest.raises(UsageError, match=r"--shard-size 18 .*groups of 4"):
        made(tmp_path, config=GenerateConfig.of(group=2, shard_size=18))
    assert shards_of(tmp_path) == before


@dataclass
class Own:
    level: float
    teacher: object = None
    name, class_names, image_size, group = "own", ("a",), 8, 1

    def identity(self):
        return {"teacher": "digest"}

    def __call__(self, ids, labels=None, seed=0):
        raise NotImplementedError


def test_a_synthesizer_of_ones_own_is_told_by_its_fields_and_its_source(tmp_path):
    one, other = identity_of(Own(0.5, object()), 3), identity_of(Own(0.25), 3)
    source = one.pop("source")
    assert one == {"method": "own", "level": 0.5, "teacher": "digest", "seed": 3}
    assert other["level"] == 0.25 and other["source"] == source and len(source) == 16


# The second process of two dies the first time that it comes to image 40; torchrun starts both again.
PROGRAM = """
import os, pathlib, sys
from dfkd.config import GenerateConfig
from dfkd.synthesis.run import generate
from tests.synthesis.tinted import Tinted

out, mark = map(pathlib.Path, sys.argv[1:])


def die(ids):
    if 24 in ids and not mark.exists():
        mark.touch()
        os._exit(9)


config = GenerateConfig.of(batch=8, group=4, shard_size=8)
pool = generate(Tinted(before=die), out, 38, 7, config=config, say=print)
assert len(pool.labels) == 38
"""


def test_two_processes_one_of_them_killed_write_the_bytes_of_one(tmp_path):
    """One process has torch's own number of threads; torchrun tells each of its own to take one."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--no-python"]

    def started(out, *more):
        words = [sys.executable, *more, "-c", PROGRAM, tmp_path / out, tmp_path / f"{out}-mark"]
        return subprocess.run([str(w) for w in words], cwd=ROOT, env=environment, capture_output=True, text=True)

    (tmp_path / "one-mark").touch()
    done, two = started("one"), started("two", *launch, sys.executable)
    assert done.returncode == 0, done.stderr
    assert two.returncode == 0 and (tmp_path / "two-mark").exists(), two.stderr
    assert len(shards_of(tmp_path / "one")) == 10 and shards_of(tmp_path / "two") == shards_of(tmp_path / "one")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    for manifest in manifests:
        for shard in manifest["shards"]:
            del shard["seconds"]
    assert manifests[0] == manifests[1]
    assert {"2 processes" in line for line in two.stdout.splitlines()} == {True}  # the first alone speaks
    assert not list((tmp_path / "two").glob(".*lock")) and not list((tmp_path / "two").glob("*.partial"))
