"""The evidence: worlds and their shifts, budgets, chosen trials, tables, and a rehearsal of each scenario."""

import json
import tomllib

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import cifar10, sets, tables, worlds
from benchmarks.quality.scenario import DATA, HERE, Scenario
from benchmarks.quality.students import some_of
from benchmarks.quality.worlds import SHIFTS, pretended
from benchmarks.tables import ROOT
from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.evaluation import open_images

NAMES = {
    "guided",
    "unguided",
    "unguided_pixels",
    "noise_pixels",
    "guided_without_pixels",
    "prior_data",
    "deepinversion",
    "fast",
    "noise",
    "real_data",
}


@pytest.mark.parametrize("name", SHIFTS)
def test_every_method_is_there_with_as_many_trials_as_any_other(name):
    scenario = Scenario.read(name)
    assert {method.name for method in scenario.methods} == NAMES
    tried = {len(method.trials) for method in scenario.methods if method.name not in ("noise", *DATA)}
    assert len(tried) == 1


@pytest.mark.parametrize("name", SHIFTS)
def test_every_trial_is_settings_that_are_taken(name, tmp_path):
    scenario = Scenario.read(name)
    for method in scenario.methods:
        for trial in range(len(method.trials) if method.name not in DATA else 0):
            asked = scenario.generating(method, trial, tmp_path, 3, tmp_path / "out")
            assert (asked.seed, asked.teacher.checkpoint) == (3, tmp_path)
    file = tomllib.loads((HERE / f"{name}.toml").read_text())
    assert scenario.learning(tmp_path, 3, tmp_path).distill.train.steps == file["distill"].get("steps") or (
        "steps" not in file["distill"]
    )


def test_the_best_trial_on_record_stands_and_others_are_refused(tmp_path, monkeypatch):
    scenario = Scenario.read("cifar10")
    monkeypatch.setattr("benchmarks.quality.scenario.RESULTS", tmp_path)
    with pytest.raises(UsageError, match="--tune"):
        scenario.chosen()
    rows = {
        method.name: [{"settings": dict(trial), "accuracy": i % 3 / 10} for i, trial in enumerate(method.trials)]
        for method in scenario.methods
    }
    (tmp_path / "quality-cifar10-tuning.json").write_text(json.dumps({"methods": rows}))
    assert scenario.chosen() == {name: 0 if len(of) == 1 else 2 for name, of in rows.items()}
    rows["fast"][1]["settings"] = {"method": "fast(steps=7)"}
    (tmp_path / "quality-cifar10-tuning.json").write_text(json.dumps({"methods": rows}))
    with pytest.raises(UsageError, match="trials of fast are not on record"):
        scenario.chosen()


def test_a_half_each_and_the_teachers_is_shifted(tmp_path):
    data = pretended(tmp_path / "data")
    whole, labels, names = cifar10.read(data, "train")
    cifar10.write(data, "sketch", tmp_path / "world")
    theirs, answers, theirs_names = cifar10.read(f"cifar:{tmp_path}/world/teacher", "train")
    others, other_labels, _ = cifar10.read(f"cifar:{tmp_path}/world/prior", "train")
    assert theirs_names == names and len(theirs) == len(others) == len(whole) // 2
    torch.testing.assert_close(others, whole[1::2], rtol=0, atol=0)
    torch.testing.assert_close(theirs, cifar10.shifted(whole[0::2], "sketch"), rtol=0, atol=0)
    assert answers.tolist() == labels[0::2].tolist() and other_labels.tolist() == labels[1::2].tolist()
    tests = open_images(f"cifar:{tmp_path}/world/teacher", "test", 32)
    torch.testing.assert_close(tests.read(torch.arange(50)), cifar10.shifted(cifar10.read(data, "test")[0], "sketch"))


def test_a_sketch_by_hand():
    """A white right half: Sobel answers 4 in the two columns beside the edge, and nowhere else."""
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :, 16:] = 1
    found = cifar10.sketched(images)
    assert found.shape == (1, 1, 32, 32)
    wanted = torch.ones(32, 32)
    wanted[:, 15:17] = 0
    torch.testing.assert_close(found[0, 0], wanted)
    assert cifar10.shifted((images * 255).byte(), "none").equal((images * 255).byte())
    blurred = cifar10.blurred(images)
    assert 0 < blurred[0, 0, 5, 15] < 0.5 < blurred[0, 0, 5, 16] < 1


def test_data_without_a_test_is_refused(tmp_path):
    pretended(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(UsageError, match="test"):
        cifar10.write(f"cifar:{tmp_path}", "none", tmp_path / "world")


def test_a_budget_takes_the_whole_groups_that_fit():
    spent = [(200, 10.0), (400, 19.0), (600, 31.0)]
    assert sets.of_budget(spent, 30) == (400, 19.0) and sets.of_budget(spent, 31) == (600, 31.0)
    with pytest.raises(ValueError, match=r"200 images takes 10\.0 s of a budget of 9 s"):
        sets.of_budget(spent, 9)


def test_some_of_the_images_are_drawn_by_the_seed():
    pool = Pool(
        torch.arange(30).view(30, 1, 1, 1).expand(-1, 3, 2, 2).byte(),
        torch.arange(30) % 3,
        torch.arange(30),
        ("a", "b", "c"),
    )
    one, again, other = some_of(pool, 10, 0), some_of(pool, 10, 0), some_of(pool, 10, 1)
    assert one.digest == again.digest != other.digest and len(one.labels) == 10
    assert (one.images[:, 0, 0, 0] % 3).tolist() == one.labels.tolist()
    assert len(some_of(pool, 99, 0).labels) == 30


def result():
    def of(accuracy, images=200):
        return {
            "says": f"of {accuracy[-1]}",
            "flop": 2.5e9,
            "accuracy": {"30": accuracy, "60": [value + 0.1 for value in accuracy]},
            "images": {"30": [images] * 2, "60": [images] * 2},
            "seconds": {"30": [29.0] * 2, "60": [59.0] * 2},
        }

    slow = of([0.3, 0.3])
    slow["accuracy"]["30"] = [None, None]
    return {
        "budgets": [30.0, 60.0],
        "seeds": [0, 1],
        "teacher": [0.88],
        "student": {"student": "resnet8", "steps": 500},
        "methods": {"slow": slow, "guided": of([0.6, 0.7]), "noise": {**of([0.1, 0.3]), "flop": None}},
        "command": "cifar10",
        "machine": {"device": "CPU", "threads": 1, "versions": {"torch": "2"}, "date": "today"},
    }


def test_the_table_ranks_and_gives_paired_distances(tmp_path):
    """By hand: 0.2 less 0.65 is -0.45; differences of -0.5 and -0.4 have a standard error of .05, times 12.706."""
    lines = tables.markdown(result()).splitlines()
    assert lines[2] == "| **of 0.7** | **65.0** | **75.0** | 200 | 2.50 G |"
    assert lines[3] == "| of 0.3 | - | 40.0 (-35.0 ± 63.5) | 200 | 2.50 G |"
    assert lines[4] == "| of 0.3 | 20.0 (-45.0 ± 63.5) | 30.0 (-45.0 ± 63.5) | 200 | - |"
    assert "88.0 %" in lines[-1] and "`python -m benchmarks.quality cifar10`" in lines[-1]
    tables.draw(result(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIFTS)
def test_a_rehearsal_judges_every_method_and_goes_on(name, tmp_path, monkeypatch, capsys):
    """A second start does nothing twice, and says the same."""
    monkeypatch.chdir(ROOT)  # the file names a method by its path from there

    def results(*more):
        words = ["quality", name, "--rehearse", "--budgets", "1", "--out", str(tmp_path), *more]
        monkeypatch.setattr("sys.argv", words)
        command.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = results("--seeds", "1")
    assert found["methods"].keys() == NAMES and found["budgets"] == [1.0]
    for method in found["methods"].values():
        assert all(len(method[key]["1"]) == 1 for key in ("accuracy", "images", "seconds"))
        assert 0 <= method["accuracy"]["1"][0] <= 1 and method["images"]["1"][0] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert results("--seeds", "1")["methods"] == found["methods"]
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_a_set_of_other_settings_is_refused_and_worlds_too(tmp_path):
    """A budget that is spent already does not hide that the settings have changed."""
    scenario = Scenario.read("demo", rehearse=True)
    noise = next(method for method in scenario.methods if method.name == "noise")
    teacher = worlds.prepare(scenario, None, 0, tmp_path).teacher
    asked = scenario.generating(noise, 0, teacher, 0, tmp_path / "noise")
    spent = sets.make(asked, 1e9, 40)
    assert sets.make(asked, 1e9, 40) == spent == sets.read_spent(asked.out) and spent[-1][0] == 40
    with pytest.raises(UsageError, match="seed"):
        sets.make(asked.replace(seed=1), 1e9, 40)
    data = pretended(tmp_path / "data")
    cifar10.write(data, "sketch", tmp_path / "world")
    with pytest.raises(UsageError, match="choose another --out"):
        cifar10.write(data, "none", tmp_path / "world")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("cifar10", "needs --data"),
        ("demo --methods unguided", "name it too"),
        ("demo --methods guided,ungided", "no 'ungided'"),
        ("demo --tune --budgets 30", "of its own"),
        ("demo --shift sketch", "unrecognized arguments"),
        ("demo --rehearse --record", "not recorded"),
        ("ablation --budgets 30", "unrecognized arguments"),
    ],
)
def test_an_option_that_could_not_act_is_refused(words, told, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quality", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and told in capsys.readouterr().err
