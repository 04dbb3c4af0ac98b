"""The report's numbers: where they come from, what is missing, what does not belong together."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dfkd.data import Record, ShardFolder, open_folder
from dfkd.data.contact_sheet import MOST_ROWS, sheet, stack, strips
from dfkd.errors import UsageError
from dfkd.evaluation import figures
from dfkd.evaluation.answers import Bin, Outcomes
from dfkd.evaluation.cost import Cost
from dfkd.evaluation.figures import DARK, LIGHT
from dfkd.evaluation.metrics import Band, confidence, interval
from dfkd.evaluation.page import duration, number, percent, signed
from dfkd.evaluation.report import OURS, measure
from dfkd.evaluation.run_folder import read_run
from dfkd.evaluation.students import Mistake
from dfkd.evaluation.tested import ClassAccuracy, accuracy, errors
from dfkd.evaluation.verdict import answers
from dfkd.synthesis.controls import STEPS
from dfkd.teachers import Classifier
from tests.evaluation.fake_run import (
    CLASS_NAMES,
    STRONG,
    WEAK,
    write_images,
    write_json,
    write_run,
    write_student,
    write_teacher,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole"))


def test_a_whole_run_is_measured(whole: Path) -> None:
    report = measure(read_run(whole), Classifier.from_pretrained(whole / "teacher"), 5)
    assert (report.missing, report.notes) == ({}, ())
    assert set(report.accuracy.missing_controls) == {"unguided-pixels", "deepinversion"}
    assert list(report.accuracy.baselines) == list(report.ranking) == ["unguided", "noise"]
    assert list(report.teacher_views) == [OURS, "unguided", "noise"]
    assert {view.images for view in report.teacher_views.values()} == {5}
    assert report.images.class_counts == (4, 4, 4)
    assert report.images.sure_counts == (2, 2, 2)  # probabilities rise with the id, the classes take turns
    assert report.images.images_per_second == 6
    assert report.student is not None
    assert (report.student.real_agreement, report.accuracy.teacher) == (0.8, pytest.approx(28 / 30))
    baselines = {"images of noise": 2.0, "images of unguided": 2.0, "baselines' students": 96.0}
    assert report.seconds == {"teacher": 61.0, "synthesis": 2.0, "distillation": 48.0} | baselines


def test_without_an_evaluation_the_folders_own_results_are_taken(tmp_path: Path) -> None:
    (write_run(tmp_path) / "evaluation.json").unlink()
    report = measure(read_run(tmp_path), None, 0)
    assert report.accuracy.student == pytest.approx(23 / 30)
    assert report.accuracy.teacher == 0.96
    assert report.accuracy.baselines == {"unguided": 0.5, "noise": 0.2}
    assert (report.errors, report.accuracy.behind, report.accuracy.teacher_interval) == (None, None, None)


def test_errors_are_the_tests(whole: Path) -> None:
    found = errors(read_run(whole))
    assert found is not None and found.outcomes == Outcomes(23, 0, 5, 2, 1)
    assert (found.calibration, found.teacher_calibration, found.reliability[0].images) == (0.05, 0.02, 10)
    worst = found.classes[2]
    assert (worst.name, worst.images, worst.student, worst.teacher) == ("two", 10, 0.6, 0.9)
    assert worst.interval == interval(0.6, 10) and worst.teacher_interval == interval(0.9, 10)
    assert found.mistakes == (Mistake("two", "zero", 0.97, "two", 0.88),)


def test_no_difference_is_stated_before_the_strong_controls_were_run(whole: Path, tmp_path: Path) -> None:
    weak = accuracy(read_run(whole))
    assert weak.differences == {} and weak.missing_controls == dict.fromkeys(
        ("unguided-pixels", "deepinversion"), "not run"
    )
    half = accuracy(read_run(write_run(tmp_path / "half", {**WEAK, "in_pixels": STRONG["in_pixels"]})))
    assert half.differences == {} and list(half.missing_controls) == ["deepinversion"]
    full = accuracy(read_run(write_run(tmp_path / "full", {**WEAK, **STRONG})))
    assert full.missing_controls == {} and list(full.differences) == ["in_pixels", "unguided", "inverted", "noise"]
    assert full.differences["in_pixels"].value == pytest.approx(5 / 30)


def test_a_control_of_far_fewer_seconds_is_none(tmp_path: Path) -> None:
    root = write_run(tmp_path, STRONG)
    manifest = tmp_path / "baselines" / "inverted" / "synthetic" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seconds": 2.0', '"seconds": 0.9'))
    found = accuracy(read_run(root))
    assert found.missing_controls == {"deepinversion": "its images took 0.9 s, the guided ones 2 s"}
    assert found.differences == {}
    steps = {"steps": 70, "guided_seconds_a_call": 2.0, "seconds_a_call": 1.9}  # counted out on a busier machine
    write_json(tmp_path / "baselines" / "inverted" / STEPS, steps)
    found = accuracy(read_run(root))
    assert found.missing_controls == {} and found.matched == {"inverted": steps}


def test_the_answers(whole: Path, tmp_path: Path) -> None:
    replaced, sure, guided = answers(accuracy(read_run(whole)), errors(read_run(whole)), {})
    assert replaced.short == "16.7 points behind" and not replaced.open
    assert "fewer than 1000" in sure.text and sure.open
    assert guided.short == "unknown" and "--controls unguided-pixels,deepinversion" in guided.text
    strong = read_run(write_run(tmp_path, STRONG))
    assert answers(accuracy(strong), errors(strong), {})[2].short == "yes: 16.7 points ahead of in_pixels"
    better = read_run(write_run(tmp_path / "better", {**STRONG, "in_pixels": (29 / 30, STRONG["in_pixels"][1])}))
    assert answers(accuracy(better), None, {})[2].short == "no: 20.0 points behind in_pixels"
    level = read_run(write_run(tmp_path / "level", {**STRONG, "in_pixels": (24 / 30, STRONG["in_pixels"][1])}))
    assert answers(accuracy(level), None, {})[2].short == "not shown: not told apart from in_pixels"
    (whole_again := write_run(tmp_path / "again", STRONG) / "evaluation" / "right.npz").unlink()
    found = answers(accuracy(read_run(whole_again.parents[1])), None, {})
    assert [answer.short for answer in found[::2]] == ["76.7 %", "unknown"]
    cheap, dear = (Cost("net", size, 4 * size, 10 * size, 1.0, "cpu") for size in (1000, 5000))
    assert answers(accuracy(strong), None, {"teacher": dear, "student": cheap})[3].short == "5.0× fewer weights"


def test_parts_that_do_not_belong_together_are_noted(tmp_path: Path) -> None:
    write_images(tmp_path / "synthetic", teacher_digest="another")
    write_student(tmp_path / "student", 0.5, data="another")
    teacher = write_teacher(tmp_path / "teacher")
    notes = measure(read_run(tmp_path), teacher, 0).notes
    assert ["teacher given" in notes[0], "other images" in notes[1]] == [True] * 2


def test_folders_named_one_by_one_take_their_place(whole: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "elsewhere", count=3)
    found = read_run(whole, synthetic=images)
    assert len(found.synthetic.records) == 3
    assert found.student is not None
    assert read_run(None, synthetic=images).student is None


def put(path: Path, data: bytes) -> None:
    write_json(path.parents[1] / "evaluation.json", {"images": 4})
    path.parent.mkdir()
    path.write_bytes(data)


def masks(images: int) -> bytes:
    np.savez(file := io.BytesIO(), student=np.ones(images, bool))
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "evaluation.json").write_text("{"), "evaluation.json is not JSON"),
        (lambda root: (root / "evaluation.json").write_text("[]"), r"it is \[\], wanted is an object"),
        (lambda root: write_json(root / "evaluation.json", {"student": 3}), "student is 3, wanted is an object"),
        (
            lambda root: write_json(root / "evaluation.json", {"baselines": {"noise": {"accuracy": "high"}}}),
            'baselines.noise.accuracy is "high", wanted is a number',
        ),
        (
            lambda root: write_json(root / "student" / "result.json", {"confusion": [[1], [2.5]]}),
            r"confusion\[1\]\[0\] is 2.5, wanted is a whole number",
        ),
        (lambda root: write_json(root / "student" / "result.json", {"class_names": 3}), "class_names is 3, wanted"),
        (
            lambda root: write_json(root / "student" / "result.json", {"confusion": [[1, 2], [3, 4]]}),
            "is not of the images' 3 classes",
        ),
        (lambda root: write_json(root / "synthetic" / "settings.json", {"options": []}), r"options is \[\], wanted"),
        (lambda root: write_json(root / "synthetic" / "settings.json", {}), "does not say 'command'"),
        (
            lambda root: write_json(
                root / "synthetic" / "settings.json",
                {"command": "", "options": {"batch": 1, "teacher_mean": 1}, "versions": {}},
            ),
            "settings.json describes no teacher",
        ),
        (lambda root: (root / "student" / "log.jsonl").write_text("3\n{}\n"), "line 1 cannot be used: it is 3"),
        (lambda root: (root / "student" / "log.jsonl").write_text('{"loss": 3}\n'), "does not say 'step'"),
        (lambda root: (root / "synthetic" / "manifest.json").unlink(), "dfkd-generate"),
        (lambda root: (root / "synthetic" / "shard-00000.tar").write_bytes(b""), "shard-00000.tar was altered"),
        (lambda root: write_json(root / "student" / "result.json", {"class_names": ["a"]}), "do not belong together"),
        (lambda root: put(root / "evaluation" / "right.npz", b"PK"), "cannot read .*right.npz"),
        (lambda root: put(root / "evaluation" / "right.npz", masks(3)), "it is no mask of the 4 images"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, change: "object", message: str) -> None:
    write_images(tmp_path / "synthetic")
    write_student(tmp_path / "student", 0.5)
    change(tmp_path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        read_run(tmp_path)


def test_a_log_may_end_in_half_a_line_but_not_hold_one(tmp_path: Path) -> None:
    write_images(tmp_path / "synthetic")
    write_student(tmp_path / "student", 0.5)
    log = tmp_path / "student" / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"st')
    student = read_run(tmp_path).student
    assert student is not None
    assert student.log == ({"step": 1, "loss": 2.0},)
    log.write_text('{"st\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UsageError, match="line 1"):
        read_run(tmp_path)


def test_the_teacher_is_the_runs_or_the_one_that_the_images_name(whole: Path, tmp_path: Path) -> None:
    guide = read_run(whole).guide
    assert guide is not None and guide.checkpoint == whole / "teacher"
    images = write_images(tmp_path / "synthetic")
    assert read_run(tmp_path).guide is None
    options = {"teacher_checkpoint": str(whole / "teacher"), "normalisation": "cifar10", "teacher": None, "cfg": 3.0}
    settings = {"command": "dfkd-generate", "options": options, "versions": {}}
    write_json(images / "settings.json", settings)
    guide = read_run(tmp_path).guide
    assert guide is not None and (guide.checkpoint, guide.normalisation) == (whole / "teacher", "cifar10")
    (tmp_path / "teacher").symlink_to(whole / "teacher")  # a folder of the run knows the rest, but not how it was shown
    write_json(images / "settings.json", settings | {"options": options | {"resize": "published"}})
    guide = read_run(tmp_path).guide
    assert guide is not None and (guide.checkpoint, guide.normalisation) == (tmp_path / "teacher", None)
    assert guide.resize == "published"
    (tmp_path / "teacher").unlink()
    write_json(images / "settings.json", settings | {"options": {"teacher_checkpoint": "absent"}})
    assert list(read_run(tmp_path).missing) == ["teacher", "student", "baselines"]


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "synthetic")
    teacher = write_teacher(tmp_path / "teacher")
    object.__setattr__(teacher, "class_names", CLASS_NAMES[::-1])
    with pytest.raises(UsageError, match="disagree about the classes"):
        measure(read_run(tmp_path), teacher, 5)


def test_a_strip_shows_the_first_images_of_its_class_unchanged(tmp_path: Path) -> None:
    pool = open_folder(write_images(tmp_path))
    rows = strips(pool)
    assert [row.class_name for row in rows] == list(CLASS_NAMES)
    assert {row.shown for row in rows} == {4}
    assert {row.scale for row in rows} == {8}
    shown = torch.frombuffer(bytearray(rows[1].picture.tobytes()), dtype=torch.uint8).view(8, -1, 4)
    second = pool.read((pool.labels == 1).nonzero()[1:2, 0])[0].permute(1, 2, 0)
    assert torch.equal(shown[:, 9:17, :3], second)  # tiles of 8 pixels, one between them
    assert not shown[:, 8, 3].any()
    assert stack(rows).height == 8 * (3 * 8 + 2)
    assert sheet(rows).width > stack(rows).width


def test_large_images_are_reduced_and_many_classes_thinned(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(2 * MOST_ROWS)]
    records = [Record(i, i, names[i], 0, "") for i in range(len(names))]
    with ShardFolder.create_or_open(tmp_path, {}, names, 160, "png", len(names), len(names)) as folder:
        folder.write(0, torch.zeros(len(names), 160, 160, 3, dtype=torch.uint8).numpy(), records)
    rows = strips(open_folder(tmp_path), columns=1)
    assert [row.label for row in rows] == list(range(0, 2 * MOST_ROWS, 2))
    assert rows[0].picture.size == (128, 128)


def drawn(figure: Figure) -> bytes:
    data = figures.png(figure)
    assert data.startswith(b"\x89PNG")
    return data


def test_charts_are_the_same_for_the_same_data_and_differ_by_theme() -> None:
    bands = {
        "cls": Band((4.0, 1.0, 0.1), (3.0, 0.5, 0.01), (5.0, 2.0, 0.2)),
        "bn": Band((1.0,) * 3, (0.9,) * 3, (1.1,) * 3),
    }
    light, again, dark = (drawn(figures.loss_curves(bands, theme)) for theme in (LIGHT, LIGHT, DARK))
    assert light == again != dark


def test_charts_take_the_extremes() -> None:
    names = [f"a class with a long name, number {i}" for i in range(40)]
    drawn(figures.class_balance([0] * 40, None, names, LIGHT))
    drawn(figures.confusion(torch.zeros(40, 40).int().tolist(), names, LIGHT))
    drawn(figures.confidence_histogram(confidence(torch.ones(9).double().numpy()), LIGHT))
    classes = [ClassAccuracy(name, 9, 0.5, (0.2, 0.8), None, None) for name in names]
    drawn(figures.class_accuracy(classes, LIGHT))
    drawn(figures.reliability({"student": (Bin(3, 1.0, 0.0),), "teacher": ()}, LIGHT))
    drawn(figures.training_curve([{"step": 1, "loss": 0.0}], LIGHT))
    drawn(figures.layer_gaps({name: [0.1, 5.0] for name in names[:9]}, LIGHT))


def test_numbers_read_well() -> None:
    assert percent(0.7666) == "76.7\N{NO-BREAK SPACE}%"
    assert number(12345.678, 1) == "12\N{NARROW NO-BREAK SPACE}345.7"
    assert [duration(s) for s in (None, 3.44, 42.4, 59.7, 125, 3720)] == [
        "–",
        "3.4 s",
        "42 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 02 min",
    ]
    assert [signed(points) for points in (1.25, -3.0)] == ["+1.2", "−3.0"]
