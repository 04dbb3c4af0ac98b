"""dfkd-engines from build to prune, in this process, on functions that compile in no time."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dfkd.cli import engines
from dfkd.config import BACKENDS
from dfkd_engine import backends
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import last_line, status_of
from tests.compiled.small_functions import Unchanged, decode, flip_a_byte, gradient, milliseconds, set_facts
from tests.compiled.test_engines import BACKEND_FILE

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("decode", "gradient")
SETS = """
[mine]
backends = ["onnxruntime"]
networks = ["decode"]

[mine.generate]
teacher-checkpoint = "t"
steps = 7
classes = ["a", "b"]

[both]
backends = ["onnxruntime", "inductor"]

[strange]
backend = "inductor"

[wrong]
backends = ["tvm"]

[absent]
networks = ["vae"]

[option.generate]
stepz = 4
"""


class Place(SimpleNamespace):
    """store, and functions: what a run of dfkd-generate uses. asked: the commands that a pipeline was made of."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("inductor", "onnxruntime"):
        monkeypatch.setitem(backends.BACKENDS, name, Unchanged(name))
    found = Place(store=EngineStore(tmp_path / "engines"), functions=(decode(), gradient()), asked=[])
    (tmp_path / "sets.toml").write_text(SETS)
    found.sets = tmp_path / "sets.toml"

    def pipeline_of(command, say):
        found.asked.append(command)
        return SimpleNamespace(functions=lambda: found.functions)

    monkeypatch.setattr("dfkd.synthesis.command.pipeline_of", pipeline_of)
    return found


def run(place, command, *options, rest=()):
    """Exit status of a command on the place's store."""
    return status_of(engines.main, command, *options, "--engines", place.store.root, *rest)


def built(place, *options, rest=()):
    assert run(place, "build", *options, rest=rest) == 0
    return {manifest.spec.network: manifest.key for manifest in place.store.list()}


def test_from_build_to_prune(place, capsys):
    keys = built(place)
    said = capsys.readouterr()
    assert last_line(said.out) == {
        "engines": str(place.store.root), "current": 0, "built": 2,
        "keys": {f"{name} inductor": keys[name] for name in NAMES},
    }  # fmt: skip
    lines = said.err.splitlines()
    assert lines[0] == "[1/2] decode in inductor, up to 12 rows: it was not built yet"
    assert lines[1].startswith("    built in ") and " ms a call of 6 rows, eager " in lines[1] and "error " in lines[1]
    assert lines[-1] == "0 engines current, 2 built"

    # all is there: nothing is done
    assert built(place) == keys
    said = capsys.readouterr()
    assert said.err.splitlines() == ["2 engines current, 0 built"] and last_line(said.out)["current"] == 2
    assert run(place, "explain") == 0
    said = capsys.readouterr()
    assert last_line(said.out)["differences"] == {f"{name} inductor": [] for name in NAMES}
    assert [line.split(": ")[1] for line in said.err.splitlines()] == ["current"] * 2

    set_facts(place.store, keys["decode"], milliseconds=milliseconds(12.5, 31.25))
    assert run(place, "list") == 0
    said = capsys.readouterr()
    assert sorted(last_line(said.out)["keys"]) == sorted(keys.values())
    head, *rows = said.err.splitlines()
    assert head.split("  ")[0] == "network" and len({len(line) for line in said.err.splitlines()}) == 1
    assert [row.split()[0] for row in rows] == ["decode", "gradient"]
    assert rows[0].split()[1:7] == ["inductor", "here", "12", "float32", "12.5", "31.25"] and keys["decode"] in rows[0]

    # sound, damaged, mended
    assert run(place, "verify") == 0
    assert last_line(capsys.readouterr().out)["sound"] == 2
    flip_a_byte(place.store, keys["decode"])
    assert run(place, "verify") == 1
    said = capsys.readouterr()
    assert last_line(said.out) == {"engines": str(place.store.root), "sound": 1, "damaged": [keys["decode"]]}
    assert f"decode {keys['decode']}: " in said.err and "altered" in said.err and "dfkd-engines build" in said.err
    assert run(place, "explain") == 0
    assert "it is damaged: " in capsys.readouterr().err
    assert built(place) == keys
    assert last_line(capsys.readouterr().out)["built"] == 1
    assert run(place, "verify") == 0
    capsys.readouterr()

    # nothing to prune, but what is asked for
    assert run(place, "prune") == 0 and last_line(capsys.readouterr().out)["removed"] == 0
    assert run(place, "prune", "--all", "--keep", keys["gradient"]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["removed"] == 1 and result["bytes_freed"] > 100
    assert [manifest.key for manifest in place.store.list()] == [keys["gradient"]]


def test_only_what_is_concerned_is_built(place, capsys):
    before = built(place)
    place.functions = (decode(seed=1), gradient())
    capsys.readouterr()
    assert run(place, "explain") == 0
    said = capsys.readouterr()
    differences = last_line(said.out)["differences"]
    assert [field[0] for field in differences["decode inductor"]] == ["components.network"]
    assert differences["gradient inductor"] == []
    line = next(line for line in said.err.splitlines() if "components.network was " in line)
    assert len(line) < 80  # digests are cut short
    built(place, "--only", "decode")
    assert last_line(capsys.readouterr().out)["built"] == 1
    assert {manifest.key for manifest in place.store.list()} > set(before.values())  # the former one is still there


def test_prune_takes_what_other_versions_built_and_what_is_old(place, monkeypatch, capsys):
    keys = built(place)
    with monkeypatch.context() as patch:
        patch.setattr(Unchanged, "versions_here", {"torch": "0.1"})
        assert len(place.store.list()) == 2 and run(place, "build") == 0
    assert run(place, "prune") == 0
    assert last_line(capsys.readouterr().out)["removed"] == 2
    assert {manifest.key for manifest in place.store.list()} == set(keys.values())
    assert run(place, "prune", rest=("--", "--steps", 9)) == 0  # all but the engines of a run
    assert last_line(capsys.readouterr().out)["removed"] == 0
    place.functions = (decode(), gradient(seed=1))
    assert run(place, "prune", "--keep", keys["gradient"], rest=("--", "--steps", 9)) == 0
    assert last_line(capsys.readouterr().out)["removed"] == 0
    assert run(place, "prune", "--older-than", 1) == 0
    assert last_line(capsys.readouterr().out)["removed"] == 0
    for manifest in place.store.list():
        text = replace(manifest, created="2024-01-01T00:00:00+00:00").to_text()
        (place.store.root / manifest.key / "manifest.json").write_text(text)
    assert run(place, "prune", "--older-than", 1, "--keep", keys["decode"]) == 0
    assert [manifest.key for manifest in place.store.list()] == [keys["decode"]]
    place.functions = (decode(seed=1),)
    assert run(place, "prune", "--set", "mine", "--sets", place.sets) == 0
    assert not place.store.list()


def test_a_failed_build_ends_in_words_and_keeps_what_is_whole(place, capsys):
    """The second fails: the first is kept, the command says why and ends with status 2."""
    place.functions = (gradient(), decode(dtype="bfloat16"))
    assert run(place, "build") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: decode in inductor, up to 12 rows cannot be built: it is out of order")
    assert [manifest.spec.network for manifest in place.store.list()] == ["gradient"]


def test_a_set_is_its_run_its_networks_and_its_backends(place, capsys):
    assert list(built(place, "--set", "mine", "--sets", place.sets)) == ["decode"]
    (run_,) = place.asked
    assert run_.generate.sampling.steps == 7 and run_.teacher.classes == ("a", "b")
    assert run_.teacher.checkpoint == Path("t")
    built(place, "--set", "mine", "--sets", place.sets, rest=("--", "--steps", "9"))
    assert place.asked[-1].generate.sampling.steps == 9  # the command line overrides it
    capsys.readouterr()
    built(place, "--set", "both", "--sets", place.sets)
    found = last_line(capsys.readouterr().out)
    assert (found["current"], found["built"]) == (1, 3) and len(found["keys"]) == 4
    built(place, "--set", "both", "--sets", place.sets, "--backend", "inductor")
    assert last_line(capsys.readouterr().out)["current"] == 2


def test_a_backend_of_the_users_own(place, tmp_path, capsys):
    (tmp_path / "own.py").write_text(BACKEND_FILE)
    name = f"{tmp_path / 'own.py'}:Program"
    keys = built(place, "--backend", name, "--only", "decode")
    assert last_line(capsys.readouterr().out)["keys"] == {f"decode {name}": keys["decode"]}
    assert run(place, "list") == 0
    assert "decode   program  here" in capsys.readouterr().err


def test_eight_bits_go_to_a_backend_that_has_them(place, capsys, monkeypatch):
    monkeypatch.setattr("dfkd.compiled.engines._in_eight_bits", lambda function, graph: graph)
    place.functions = (decode(quantise="int8"), gradient())
    built(place, rest=("--", "--quantise", "int8"))
    assert list(last_line(capsys.readouterr().out)["keys"]) == ["decode onnxruntime", "gradient onnxruntime"]
    assert run(place, "list") == 0
    assert "int8" in capsys.readouterr().err
    built(place, "--set", "both", "--sets", place.sets)  # inductor takes what it can
    assert list(last_line(capsys.readouterr().out)["keys"]) == [
        "decode onnxruntime", "gradient onnxruntime", "gradient inductor"
    ]  # fmt: skip
    assert run(place, "build", "--backend", "inductor") == 2
    said = capsys.readouterr().err
    assert "inductor takes no decode int8" in said and "use --backend onnxruntime" in said


def test_targets_are_compiled_for_ahead_of_time(place, capsys, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "tensorrt-rtx", Unchanged("tensorrt-rtx", True, ("sm_80", "sm_89")))
    built(place, "--backend", "tensorrt-rtx", "--target", "sm_89,sm_80", "--only", "decode")
    assert "ahead of time; it is judged on the GPU" in capsys.readouterr().err
    (manifest,) = place.store.list()
    assert manifest.spec.device == "cuda sm_80+sm_89" and "parity" not in manifest.facts
    assert run(place, "list") == 0
    line = capsys.readouterr().err.splitlines()[1]
    assert line.split()[1:8] == ["tensorrt-rtx", "sm_80", "sm_89", "6", "float32", "-", "-"]
    assert run(place, "build", "--backend", "onnxruntime", "--target", "sm_89") == 2
    assert "compiles for the machine that it is on, not for sm_89" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--set", "yours"], "has no set 'yours': it has mine, both, strange, wrong, absent"),
        (["--set", "strange"], "[strange] has an unknown key 'backend'"),
        (["--set", "wrong"], "the set wrong names the backend 'tvm'"),
        (["--set", "absent"], "there is no network 'vae': a run with these options has decode, gradient"),
        (["--set", "option"], "unknown argument --stepz"),
        (["--set", "mine", "--only", "gradient,pixels"], "there is no network 'pixels'"),
        (["--set", "mine", "--backend", "eager"], "--backend is 'eager'"),
        (["--set", "mine", "--", "--guidance", "3"], "unknown argument --guidance"),
        (["--sets", "nowhere.toml", "--set", "demo"], "cannot read nowhere.toml: No such file"),
    ],
)
def test_sets_that_are_wrong(place, capsys, argv, words):
    for command in ("build", "explain"):
        assert status_of(engines.main, command, "--sets", place.sets, "--engines", place.store.root, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and words in error
    assert not place.store.root.exists()


def test_a_run_that_uses_no_engines(place, capsys):
    place.functions = ()
    assert run(place, "build", rest=("--", "--gradient", "unet")) == 2
    assert "these options use no engines" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "sd15-256", "sd15-512", "demo-rtx"])
def test_the_sets_of_the_project(name):
    options = engines.Build(sets=ROOT / "build/engines.toml", set=name)
    found = engines.read_set(options, ["--teacher-checkpoint", "t"])
    assert set(found.backends) <= set(BACKENDS)
    if name.startswith("sd15"):
        assert found.run.generate.sampling.size == int(name.removeprefix("sd15-"))
        assert found.run.generate.compute.dtype == "fp16"
    assert bool(found.targets) == name.endswith("rtx")


@pytest.mark.parametrize(
    "argv, status, words",
    [
        ([], 2, "usage: dfkd-engines build|list"),
        (["--help"], 0, "usage: dfkd-engines build|list"),
        (["rebuild"], 2, "error: unknown command rebuild"),
        (["list", "--enginse", "x"], 2, "unknown argument --enginse: did you mean --engines"),
        (["build", "--help"], 0, "judged against float64"),
        (["prune", "--help"], 0, "--older-than"),
    ],
)
def test_words(capsys, argv, status, words):
    assert status_of(engines.main, *argv) == status
    said = capsys.readouterr()
    assert words in said.out + said.err


def test_a_folder_without_engines(tmp_path, capsys):
    answers = {"list": {"keys": []}, "verify": {"sound": 0, "damaged": []}, "prune": {"removed": 0}}
    for command, expected in answers.items():
        assert status_of(engines.main, command, "--engines", tmp_path / "none") == 0
        assert expected.items() <= last_line(capsys.readouterr().out).items()
    assert not (tmp_path / "none").exists()
