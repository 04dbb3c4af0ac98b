"""A method that learns from its own calls: groups in turn, state beside the shards, the same bytes after any stop."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfkd.config import GenerateConfig
from dfkd.data import ShardFolder
from dfkd.errors import UsageError
from dfkd.runtime import Rank
from dfkd.synthesis.batching import ShortMemory
from dfkd.synthesis.carried import Carried
from dfkd.synthesis.run import generate, open_run
from dfkd.synthesis.synthesizer import Sample, records_of
from tests.cli.small_generate import shards_of
from tests.training.small_run import Killed, teacher

CONFIG = GenerateConfig.of(batch=8, group=4, shard_size=8, threads=1)
COUNT = 28  # shards of 8, 8, 8 and 4 images


class Learner:
    """Images of one grey level, which follows from every call before and from the student."""

    name, image_size, group = "learner", 4, 4
    class_names: tuple[str, ...] = ("zero", "one", "two")

    def __init__(self, before: Callable[[Sequence[int]], object] = lambda ids: None) -> None:
        self.level, self.before, self.calls = torch.tensor(1), before, list[int]()

    def identity(self) -> dict[str, int]:
        return {}

    def update(self, student: object) -> None:
        self.level = self.level + 5

    def state_dict(self) -> dict[str, Tensor]:
        return {"level": self.level}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.level = state["level"]

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        self.calls.append(ids[0])
        self.level = (self.level * 3 + ids[0] + seed) % 251
        self.before(ids)  # which may fail once something was learned
        shown = torch.tensor([i % 3 for i in ids])
        images = torch.full((len(ids), 3, 4, 4), int(self.level), dtype=torch.uint8)
        return Sample(images, shown, records_of(ids, shown, self.class_names, seed))


def made(out: Path, synthesizer: Learner | None = None) -> Learner:
    """The synthesizer, after a run on the folder."""
    synthesizer = synthesizer or Learner()
    generate(synthesizer, out, COUNT, 7, config=CONFIG)
    return synthesizer


def dies_at(first: int) -> Learner:
    def die(ids: Sequence[int]) -> None:
        if ids[0] == first:
            raise Killed

    return Learner(die)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    made(folder)
    return folder


def test_a_call_is_a_group_and_one_state_stays(whole: Path) -> None:
    assert made(whole).calls == []
    assert [file.name for file in whole.glob("state-*")] == ["state-00003.safetensors"]


@pytest.mark.parametrize("first", [0, 4, 8, 12, 24])
def test_a_killed_run_goes_on_with_what_was_learned(first: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        made(tmp_path, dies_at(first))
    assert made(tmp_path).calls[0] == first // 8 * 8 and shards_of(tmp_path) == shards_of(whole)


@pytest.mark.parametrize("moment", ["saved", "committed"])
def test_a_run_killed_around_a_shards_commit(
    moment: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (ShardFolder, "write") if moment == "saved" else (Carried, "forget_before")
    real = getattr(owner, name)

    def dies(self: object, index: int, *given: object) -> None:
        if index == 1:
            raise Killed
        real(self, index, *given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies)
        made(tmp_path)
    assert len(list(tmp_path.glob("state-*"))) == 2  # of the shard that is counted, and of its neighbour
    assert made(tmp_path).calls[0] == (8 if moment == "saved" else 16)
    assert shards_of(tmp_path) == shards_of(whole) and len(list(tmp_path.glob("state-*"))) == 1


@pytest.mark.parametrize("damaged", ["shard-00001.tar", "state-00003.safetensors"])
def test_without_the_state_before_a_shard_it_starts_over(damaged: str, whole: Path, tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / damaged).write_bytes(b"")
    if damaged.startswith("state"):  # of a finished folder it is not needed; of an unfinished one it is
        assert made(tmp_path).calls == []
        (tmp_path / "shard-00003.tar").unlink()
    assert made(tmp_path).calls == list(range(0, COUNT, 4)) and shards_of(tmp_path) == shards_of(whole)


def test_what_a_call_without_memory_learned_is_forgotten(whole: Path, tmp_path: Path) -> None:
    short: Iterator[bool] = iter([False, False, True])

    class Smaller(Learner):
        call_size = 4

    def fails(ids: Sequence[int]) -> None:
        if next(short, False):
            raise ShortMemory("learner", "a test says so")

    assert made(tmp_path, Smaller(fails)).calls == [0, 4, 8, 8, 12, 16, 20, 24]
    assert shards_of(tmp_path) == shards_of(whole)


def test_a_newer_student_meets_the_state_it_would_have_met(tmp_path: Path) -> None:
    """From id 16 on: killed before, at and after its first image."""

    def against(out: Path, synthesizer: Learner) -> None:
        with open_run(synthesizer, out, COUNT, 7, CONFIG) as run:
            for part in (range(16), range(16, COUNT)):
                if part.start:
                    run.update(teacher(), part.start)
                run.write(part=part)

    against(tmp_path / "whole", Learner())
    for first in (12, 16, 24):
        with pytest.raises(Killed):
            against(tmp_path / str(first), dies_at(first))
        against(tmp_path / str(first), Learner())
        assert shards_of(tmp_path / str(first)) == shards_of(tmp_path / "whole")
    shards = json.loads((tmp_path / "whole/manifest.json").read_text())["shards"]
    assert [shard.get("student") for shard in shards] == [None, None, *[teacher().digest()[:16]] * 2]
    with pytest.raises(UsageError, match=r"shard-00002\.tar was made against the student"):
        made(tmp_path / "whole")


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method learner in 2 processes: each of its images follows"):
        generate(Learner(), tmp_path, COUNT, rank=Rank(0, 2))
    assert not list(tmp_path.iterdir())
