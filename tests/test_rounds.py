"""[rounds] of dfkd-run: images and students in turn, in one run that may be killed anywhere."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd.cli import run as cli
from dfkd.data import Record, read_folder
from dfkd.errors import UsageError
from dfkd.job import read_job
from dfkd.run import run_job
from dfkd.teachers import Classifier
from tests.cli.small_generate import CLASS_NAMES, last_line, save_classifier, shards_of, status_of
from tests.synthesis.small_sd import make_small_sd
from tests.training.small_run import Killed, equal

ROOT = Path(__file__).parents[1]
COUNT, ROUNDS = 24, {"rounds": 8, "refresh-every": 2, "adv-from": 4, "steps": 6, "lr": 0.05}
PHASES = [range(start, start + 6) for start in range(0, COUNT, 6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prior, and a teacher that its student learns to agree with soon: the same network, less sure."""
    root = tmp_path_factory.mktemp("rounds")
    make_small_sd(root / "prior")
    save_classifier(root / "teacher")
    student = Classifier.from_pretrained(root / "teacher")
    with torch.no_grad():
        for parameter in list(student.parameters())[-2:]:
            parameter.mul_(0.5)
    student.save_pretrained(root / "agreeing")
    return root


def file_of(place: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of a run, with some options replaced."""
    file: dict[str, dict[str, Any]] = {
        "teacher": {"checkpoint": str(place / "teacher")},
        "generate": {"prior": str(place / "prior"), "count": COUNT, "group": 3, "steps": 2, "adv-weight": 5.0},
        "rounds": {**ROUNDS, "init": str(place / "agreeing")},
        "distill": {"student": "resnet8", "steps": 2, "batch-size": 4, "augment": "none"},
    }
    for name in ("generate", "distill"):
        file[name]["device"] = "cpu"
    for name, options in sections.items():
        file[name] = {key: value for key, value in {**file.get(name, {}), **options}.items() if value is not None}
    return file


def made(place: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return run_job(read_job(file_of(place, **sections), out))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    result = made(place, place / "whole")
    (place / "result.json").write_text(json.dumps(result, default=str))
    return place / "whole"


def records_of(run: Path) -> tuple[Record, ...]:
    return read_folder(run / "synthetic").records


def students_of(run: Path) -> list[Path]:
    return sorted(run.glob("rounds/*/student"))


def test_phases_lie_in_one_folder_and_end_shards(place: Path, whole: Path) -> None:
    manifest = json.loads((whole / "synthetic/manifest.json").read_text())
    assert [range(one["first_id"], one["first_id"] + one["count"]) for one in manifest["shards"]] == PHASES
    students = students_of(whole)
    digests = [Classifier.from_pretrained(one / "last").digest()[:16] for one in students]
    assert [one.parent.name for one in students] == ["001", "002", "003"] and len(set(digests)) == 3
    assert [one.get("student") for one in manifest["shards"]] == [None, None, *digests[1:]]
    assert [record.id for record in records_of(whole)] == list(range(COUNT))
    result = json.loads((place / "result.json").read_text())
    refreshes = [(one["images"], one["steps"], one["ended_by"]) for one in result["refreshes"]]
    assert refreshes == [(6, 6, "length"), (12, 6, "length"), (18, 6, "length")]
    assert all(0 <= one["agreement"] <= 1 for one in result["refreshes"])
    report = json.loads((whole / "report/report.json").read_text())
    assert [one["agreement"] for one in report["refreshes"]] == [one["agreement"] for one in result["refreshes"]]
    assert report["seconds"]["refreshes"] > 0
    assert "Refreshed between rounds" in (whole / "report/report.html").read_text()


def test_the_adversarial_loss_acts_from_its_round_on(place: Path, whole: Path) -> None:
    assert ["adv" in record.losses for record in records_of(whole)] == [i >= 12 for i in range(COUNT)]
    plain = made(place, place / "plain", rounds={"adv-from": None}, generate={"adv-weight": None})
    ours, without = shards_of(whole / "synthetic"), shards_of(place / "plain/synthetic")
    same = {name: ours[name] == without[name] for name in ours if name.endswith(".tar")}
    assert list(same.values()) == [True, True, False, False] and len(plain["refreshes"]) == 3


def test_without_an_adversary_the_images_are_those_of_no_rounds(place: Path, whole: Path, tmp_path: Path) -> None:
    made(place, tmp_path, rounds={"rounds": "none"}, generate={"adv-weight": 0.0, "shard-size": 6})
    made(place, tmp_path / "replay", rounds={"adv-from": None}, generate={"adv-weight": 0.0})
    assert not (tmp_path / "rounds").exists() and len(students_of(tmp_path / "replay")) == 3
    assert shards_of(tmp_path / "synthetic") == shards_of(tmp_path / "replay/synthetic")


def test_a_refresh_goes_on_from_the_one_before_on_all_images_so_far(place: Path, tmp_path: Path, whole: Path) -> None:
    still = {"rounds": {"lr": 0.0}}
    made(place, tmp_path, **still)
    weight = "fc.weight"
    kept = [Classifier.from_pretrained(one / "last").state_dict()[weight] for one in students_of(tmp_path)]
    start = Classifier.from_pretrained(place / "agreeing").state_dict()[weight]
    assert all(torch.equal(start, one) for one in kept)
    runs = [json.loads((one / "result.json").read_text())["run"] for one in students_of(whole)]
    assert len({one["data"] for one in runs}) == 3 and len({one["student"] for one in runs}) == 3


def test_a_plateau_ends_a_refresh_early(place: Path, tmp_path: Path) -> None:
    flat = {"steps": 12, "checkpoint-every": 2, "plateau": 1, "lr": 0.0}
    result = made(place, tmp_path, rounds=flat)
    assert {one["ended_by"] for one in result["refreshes"]} == {"plateau"}
    assert all(one["steps"] < 12 for one in result["refreshes"])


# Stage and how many tellings of its progress a run gets before it is killed: within and between both kinds of stages.
KILLS = [("images", 3), ("refresh 001", 4), ("images", 6), ("refresh 003", 2), ("student", 1)]
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from dfkd.job import read_job
from dfkd.run import run_job

file, out, stage, left = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def watch(name, done, total):
    global left
    left -= name == stage
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

run_job(read_job(file, out), watch)
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    given = json.dumps(file_of(place))
    for stage, tellings in KILLS:
        words = [sys.executable, "-c", PROGRAM, given, str(tmp_path), stage, str(tellings)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == -9, done.stderr
    made(place, tmp_path)
    assert shards_of(tmp_path / "synthetic") == shards_of(whole / "synthetic")
    for mine, theirs in zip(students_of(tmp_path), students_of(whole), strict=True):
        assert equal(mine / "last", theirs / "last")
    assert equal(tmp_path / "student/last", whole / "student/last")


def test_started_again_nothing_is_done_twice(place: Path, whole: Path) -> None:
    def state() -> dict[str, int]:
        files = (*whole.glob("rounds/*/student/last/*"), *whole.glob("synthetic/shard-*"))
        return {str(file): file.stat().st_mtime_ns for file in files}

    before = state()
    made(place, whole)
    assert state() == before


def test_images_against_another_student_are_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    made(place, tmp_path)
    for student in students_of(tmp_path):
        for file in (*student.rglob("*"),):
            if file.is_file():
                file.unlink()
    with pytest.raises(UsageError, match=r"shard-00002\.tar was made against the student \w+: .* is \w+ now"):
        made(place, tmp_path, rounds={"lr": 0.01})


def test_the_command_tells_phases_and_refreshes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for name, options in file_of(place).items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    (tmp_path / "job.toml").write_text("\n".join(lines))
    assert status_of(cli.main, tmp_path / "job.toml", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert len(last_line(printed.out)["refreshes"]) == 3
    assert "phase 3 of 4: images 12 to 17, against the student of refresh 2" in printed.err
    assert re.search(r"refresh 3: agreement with the teacher [01]\.", printed.err)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rounds": {"rounds": None}}, r"\[rounds\] rounds is missing"),
        ({"rounds": {"rounds": 1}}, r"\[rounds\] rounds is 1: it must be at least 2"),
        ({"rounds": {"rounds": 2}}, r"refresh-every 2 is no less than rounds 2: none comes"),
        ({"rounds": {"adv-from": 8}}, r"adv-from 8 cannot act: .* the last round is after 7"),
        ({"rounds": {"adv-from": 1}}, r"adv-from 1 cannot act: the first student comes after 2 rounds"),
        ({"rounds": {"adv-from": 3}}, r"adv-from 3 is no multiple of refresh-every 2"),
        ({"rounds": {"refresh-evry": 2}}, r"\[rounds\] refresh-evry: unknown option: did you mean refresh-every"),
        ({"rounds": {"temprature": 2}}, r"\[rounds\] temprature: unknown option: did you mean temperature"),
        ({"rounds": {"data": ["x"]}}, r"\[rounds\] data: the run sets it"),
        ({"rounds": {"batch-size": 1}}, r"\[rounds\] batch_size is 1"),
        ({"rounds": {"plateau": 99}}, r"--plateau 99 cannot act"),
        ({"rounds": {"init": "absent"}}, r"absent"),
        ({"distill": {"init": "absent"}}, r"absent"),
        ({"distill": {"batch-size": 1}}, r"\[distill\] batch_size is 1"),
        ({"generate": {"count": 20}}, r"\[rounds\] rounds 8 with 20 images: they do not share them evenly"),
        ({"generate": {"group": 4}}, r"\[generate\] group 4 with \[rounds\]: a phase of 2 rounds has 6 images"),
        ({"generate": {"group": 6, "keep-intermediates": 1}}, r"\[generate\] group 12 with \[rounds\]: a phase of 2"),
        ({"generate": {"method": "fast(group=4)", "adv-weight": None}}, r"\[generate\] group 4 with \[rounds\]"),
        ({"generate": {"shard-size": 12}}, r"\[generate\] shard-size 12 with \[rounds\]: each phase has 6 images"),
        ({"generate": {"adv-weight": 0}}, r"\[rounds\] adv-from 4 cannot act: nothing in \[generate\] goes by a"),
        ({"rounds": {"adv-from": None}}, r"\[generate\] adv-weight, or keep learnable, goes by a student: none is"),
        ({"generate": {"student-checkpoint": "x"}}, r"\[generate\] student-checkpoint: with \[rounds\] adv-from"),
    ],
)
def test_what_rounds_cannot_do_is_refused_before_work(
    sections: dict[str, dict[str, Any]], words: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        made(place, tmp_path / "out", **sections)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_method_that_learns_hands_its_state_on_from_phase_to_phase(place: Path, tmp_path: Path) -> None:
    """Its student comes in between; killed in the second image of a phase, and at a phase's end."""
    small = "generative(steps=2, warmup=2, latent=5, width=4, adv_weight=5)"
    own = {"generate": {"method": small, "adv-weight": None, "prior": None, "size": 16, "steps": None}}
    made(place, tmp_path / "whole", **own)
    for stage, after in (("images", 11), ("refresh 002", 4)):
        left = [after]

        def dies(name: str, done: float, total: int, stage: str = stage, left: list[int] = left) -> None:
            left[0] -= name == stage
            if not left[0]:
                raise Killed

        with pytest.raises(Killed):
            run_job(read_job(file_of(place, **own), tmp_path / "killed"), dies)
    made(place, tmp_path / "killed", **own)
    assert shards_of(tmp_path / "killed/synthetic") == shards_of(tmp_path / "whole/synthetic")
    assert equal(tmp_path / "killed/student/last", tmp_path / "whole/student/last")
    made(place, tmp_path / "alone", **own, rounds={"rounds": "none"})
    same = [
        mine == theirs
        for mine, theirs in zip(
            read_folder(tmp_path / "whole/synthetic").images,
            read_folder(tmp_path / "alone/synthetic").images,
            strict=True,
        )
    ]
    assert [bool(one.all()) for one in same] == [i < 12 for i in range(COUNT)]  # the student acts from id 12 on


def test_candidates_are_chosen_for_the_student_last_refreshed(place: Path, tmp_path: Path) -> None:
    own = {"candidates": 2, "keep": "learnable", "adv-weight": None}
    made(place, tmp_path, generate=own)
    assert [record.candidate is not None for record in records_of(tmp_path)] == [i >= 12 for i in range(COUNT)]


def test_snapshots_of_a_trajectory_lie_in_one_phase(place: Path, tmp_path: Path) -> None:
    made(place, tmp_path, generate={"keep-intermediates": 1, "filter-views": 2})
    finished = [record for record in records_of(tmp_path) if record.id % 2]  # of each two; the filter dropped some
    assert {"adv" in record.losses for record in finished} == {False, True}
    assert all(("adv" in record.losses) == (record.id >= 12) for record in finished)


def test_a_control_is_granted_the_seconds_of_images_against_the_last_student(place: Path, whole: Path) -> None:
    run_job(read_job({**file_of(place), "controls": ["unguided-pixels"]}, whole))
    steps = json.loads((whole / "baselines/unguided-pixels/equal-seconds.json").read_text())["steps"]
    settings = json.loads((whole / "baselines/unguided-pixels/synthetic/settings.json").read_text())["options"]
    assert (settings["refine_steps"], settings["student_checkpoint"]) == (steps, None)


def test_baselines_are_made_at_once_and_without_a_student(place: Path, tmp_path: Path) -> None:
    file = file_of(place, generate={"adv-loss": "reference", "adv-reference": 0.5, "adv-clamp": 4.0})
    file |= {"baselines": {"noise": {"method": "noise"}, "unguided": {"guidance-step": 0.0}}}
    ours, *baselines = read_job(file, tmp_path).variants
    assert ours.generate.student_checkpoint == tmp_path / "rounds/003/student/last"
    assert ours.generate.generate.guidance.adv_weight == 5
    for one in baselines:
        assert one.generate.student_checkpoint is None and one.generate.generate.guidance.adv_weight == 0
    assert CLASS_NAMES
