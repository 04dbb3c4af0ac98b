"""The report's numbers: where they come from, what is missing, what does not belong together."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from dfkd.data import Record, ShardFolder, open_folder
from dfkd.data.contact_sheet import MOST_ROWS, sheet, stack, strips
from dfkd.errors import UsageError
from dfkd.evaluation import figures
from dfkd.evaluation.figures import DARK, LIGHT
from dfkd.evaluation.metrics import Band, confidence
from dfkd.evaluation.page import duration, number, percent, signed
from dfkd.evaluation.report import OURS, measure
from dfkd.evaluation.run_folder import read_run
from dfkd.teachers import Classifier
from tests.evaluation.fake_run import CLASS_NAMES, write_images, write_json, write_run, write_student, write_teacher


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole"))


def test_a_whole_run_is_measured(whole: Path) -> None:
    report = measure(read_run(whole), Classifier.from_pretrained(whole / "teacher"), 5)
    assert (report.missing, report.notes) == ({}, ())
    assert report.accuracy.best_baseline == "unguided"
    assert report.accuracy.margin == pytest.approx(100 * (23 / 30 - 0.5))
    assert list(report.accuracy.baselines) == list(report.ranking) == ["unguided", "noise"]
    assert list(report.teacher_views) == [OURS, "unguided", "noise"]
    assert {view.images for view in report.teacher_views.values()} == {5}
    assert report.images.class_counts == (4, 4, 4)
    assert report.images.sure_counts == (2, 2, 2)  # probabilities rise with the id, the classes take turns
    assert report.images.images_per_second == 6
    assert report.student is not None
    assert (report.student.real_agreement, report.student.calibration, report.accuracy.teacher) == (0.8, 0.05, 0.95)
    assert report.seconds == {"teacher": 61.0, "synthesis": 2.0, "distillation": 48.0, "baselines' students": 96.0}


def test_without_an_evaluation_the_folders_own_results_are_taken(tmp_path: Path) -> None:
    (write_run(tmp_path) / "evaluation.json").unlink()
    report = measure(read_run(tmp_path), None, 0)
    assert report.accuracy.student == pytest.approx(23 / 30)
    assert report.accuracy.teacher == 0.96
    assert report.accuracy.baselines == {"unguided": 0.5, "noise": 0.2}
    assert report.student is not None and report.student.calibration is None


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
