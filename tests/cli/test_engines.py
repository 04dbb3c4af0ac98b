"""dfkd-engines from build to prune, in this process, on networks that compile in seconds."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfkd.cli import engines
from dfkd_engine.spec import cpu_architecture
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import last_line, status_of
from tests.compiled.small_engines import (
    BACKEND,
    NEEDS_IT,
    flip_a_byte,
    folders,
    key_of,
    nudge,
    set_facts,
    words,
)

ROOT = Path(__file__).resolve().parents[2]


def run(command, place, *options, rest=None):
    """Exit status of a command on the place's store; build and explain take options of dfkd-generate as well."""
    argv = [command, *options, "--engines", place.store]
    if command in ("build", "explain"):
        argv += ["--backend", BACKEND, "--", *(place.words() if rest is None else rest)]
    return status_of(engines.main, *argv)


@NEEDS_IT
def test_from_build_to_prune(own, capsys):
    # all is there: nothing is done
    assert run("build", own) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == ["3 engines of these options, 3 current"]
    keys = {network: key_of(own.store, network) for network in ("unet", "decode", "gradient")}
    assert last_line(said.out) == {
        "engines": str(own.store), "current": 3, "adopted": 0, "built": 0,
        "keys": {f"{network} {BACKEND}": key for network, key in keys.items()},
    }  # fmt: skip
    assert run("explain", own) == 0
    said = capsys.readouterr()
    assert last_line(said.out)["differences"] == {f"{network} {BACKEND}": [] for network in keys}
    assert [line.split(": ")[1] for line in said.err.splitlines()] == ["current"] * 3

    assert run("list", own) == 0
    said = capsys.readouterr()
    assert sorted(last_line(said.out)["keys"]) == sorted(keys.values())
    head, *rows = said.err.splitlines()
    assert head.split("  ")[0] == "network" and len({len(line) for line in said.err.splitlines()}) == 1
    assert [row.split()[0] for row in rows] == ["decode", "gradient", "unet"]
    assert all(row.split()[1] == BACKEND and keys[row.split()[0]] in row for row in rows)

    # sound, damaged, mended
    assert run("verify", own) == 0
    assert last_line(capsys.readouterr().out)["sound"] == 3
    flip_a_byte(own.store, "decode")
    assert run("verify", own) == 1
    said = capsys.readouterr()
    assert last_line(said.out) == {"engines": str(own.store), "sound": 2, "damaged": [keys["decode"]]}
    assert f"decode {keys['decode']}: " in said.err and "altered" in said.err and "dfkd-engines build" in said.err
    assert run("explain", own) == 0
    said = capsys.readouterr()
    assert "damaged" in said.err and last_line(said.out)["differences"][f"decode {BACKEND}"][0][0] == "engine"
    assert run("build", own) == 0
    said = capsys.readouterr()
    assert {k: v for k, v in last_line(said.out).items() if k in ("current", "adopted", "built")} == {
        "current": 2, "adopted": 0, "built": 1,
    }  # fmt: skip
    lines = said.err.splitlines()
    assert lines[0] == "3 engines of these options, 2 current"
    assert lines[1].startswith(f"[1/1] decode in {BACKEND}, up to 6 rows: it is damaged: ")
    assert lines[2].startswith("    built in ") and " ms a call of 6 rows, eager " in lines[2] and "error " in lines[2]
    assert run("verify", own) == 0
    capsys.readouterr()

    # nothing to prune, but what is asked for
    assert run("prune", own) == 0 and last_line(capsys.readouterr().out)["removed"] == 0
    assert run("prune", own, "--all", "--keep", keys["unet"]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["removed"] == 2 and result["bytes_freed"] > 1000
    assert [manifest.key for manifest in EngineStore(own.store).list()] == [keys["unet"]]
    assert run("prune", own, "--all") == 0 and last_line(capsys.readouterr().out)["removed"] == 1
    assert run("list", own) == 0 and f"no engines in {own.store}" in capsys.readouterr().err


@NEEDS_IT
def test_only_what_is_concerned_is_built(own, tmp_path, capsys):
    prior = shutil.copytree(own.prior, tmp_path / "prior")
    nudge(next((prior / "vae").glob("*.safetensors")))
    rest = words(prior, own.teacher)
    assert run("explain", own, rest=rest) == 0
    said = capsys.readouterr()
    assert {name: [field[0] for field in fields] for name, fields in last_line(said.out)["differences"].items()} == {
        f"unet {BACKEND}": [], f"decode {BACKEND}": ["prior.vae"], f"gradient {BACKEND}": ["prior.vae"],
    }  # fmt: skip
    assert f"decode in {BACKEND}, up to 6 rows: not current" in said.err
    line = next(line for line in said.err.splitlines() if "prior.vae was " in line)
    assert " and is " in line and len(line) < 80  # digests are cut short
    before = {manifest.key for manifest in EngineStore(own.store).list()}
    assert run("build", own, "--only", "unet,decode", rest=rest) == 0
    said = capsys.readouterr()
    assert last_line(said.out)["built"] == 1 and last_line(said.out)["current"] == 1
    after = {manifest.key: manifest.spec.network for manifest in EngineStore(own.store).list()}
    assert before < after.keys() and [after[key] for key in after.keys() - before] == ["decode"]
    assert run("build", own) == 0  # the former prior's are still there
    assert last_line(capsys.readouterr().out)["current"] == 3


@NEEDS_IT
def test_prune_takes_what_other_versions_built_and_what_is_old(own, monkeypatch, capsys):
    real = engines.versions
    monkeypatch.setattr(engines, "versions", lambda *names: real(*names) | {"onnxruntime": "0.1"})
    keep = key_of(own.store, "decode")
    assert run("prune", own, "--keep", keep) == 0
    assert last_line(capsys.readouterr().out)["removed"] == 2
    monkeypatch.undo()
    assert run("prune", own, "--older-than", 1) == 0
    assert last_line(capsys.readouterr().out)["removed"] == 0
    time.sleep(1.1)  # times are kept in whole seconds
    assert run("prune", own, "--older-than", 1 / 86400) == 0
    assert last_line(capsys.readouterr().out)["removed"] == 1


@NEEDS_IT
def test_current_is_answered_in_a_new_process_without_torch(place):
    """`build` twice: the second answers at once, whatever the machine has to load for the first."""
    argv = ["build", "--engines", place.store, "--backend", BACKEND, "--", *place.words()]
    script = (
        "import sys\nfrom dfkd.cli.engines import main\n"
        f"try:\n    main({[str(word) for word in argv]!r})\n"
        "except SystemExit as done:\n"
        "    print(int(done.code or 0), *sorted({'torch', 'diffusers', 'onnx'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0" and "3 engines of these options, 3 current" in done.stderr


@NEEDS_IT
def test_a_failed_build_ends_in_words_and_keeps_what_is_whole(own, tmp_path, monkeypatch, capsys):
    """The second of three fails: the first is kept, the command says why and ends with status 2."""
    from dfkd.compiled import build as workshop
    from dfkd_engine.parity import Tolerance

    empty = own._replace(store=tmp_path / "empty")
    monkeypatch.setitem(workshop.TOLERANCE, ("forward", "float32"), Tolerance(1e-12))
    argv = ["build", "--only", "decode", "--engines", empty.store, "--backend", BACKEND, "--", *own.words()]
    assert status_of(engines.main, *argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: decode in {BACKEND}, up to 6 rows is not saved: against float64 its relative")
    assert not EngineStore(empty.store).list() and status_of(engines.main, "verify", "--engines", empty.store) == 0


class TestSets:
    @pytest.fixture
    def sets(self, tmp_path_factory):
        prior, teacher = folders(tmp_path_factory.getbasetemp() / "engines")
        file = tmp_path_factory.mktemp("sets") / "sets.toml"
        options = dict(zip(words(prior, teacher)[::2], words(prior, teacher)[1::2], strict=True))
        lines = [f"{name.removeprefix('--')} = {json.dumps(value)}" for name, value in options.items()]
        file.write_text(
            "\n".join([f'[mine]\nbackends = ["{BACKEND}"]\n[mine.generate]', *lines])
            + '\n[strange]\nbackend = "inductor"\n[wrong]\nbackends = ["tvm"]\n[none]\nnetworks = ["vae"]\n'
        )
        return file

    def refused(self, capsys, *argv):
        assert status_of(engines.main, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        return error

    @pytest.mark.parametrize(
        "argv, words",
        [
            (["--set", "yours"], "has no set 'yours': it has mine, strange, wrong, none"),
            (["--set", "strange"], "[strange] has an unknown key 'backend'"),
            (["--set", "wrong"], "the set wrong names the backend 'tvm'"),
            (["--set", "none"], "the set none names the network 'vae'"),
            (["--set", "mine", "--only", "gradient,pixels"], "--only names 'pixels'"),
            (["--set", "mine", "--backend", "eager"], "--backend is 'eager'"),
            (["--set", "mine", "--", "--stepz", "3"], "unknown argument --stepz"),
            (["--set", "mine", "--", "--gradient", "unet"], "--gradient unet uses no engines"),
            (["--set", "mine", "--", "--prior", "no/such/folder"], "no such folder"),
            (["--set", "mine", "--", "--teacher-checkpoint", "no-such"], "cannot read the teacher's no-such"),
            (["--", "--group", "6"], "no teacher"),
        ],
    )
    @pytest.mark.parametrize("command", ["build", "explain"])
    def test_errors(self, sets, tmp_path, capsys, command, argv, words):
        argv = [command, "--sets", sets, "--engines", tmp_path / "store", *argv]
        assert words in self.refused(capsys, *argv)
        assert not (tmp_path / "store").exists()

    def test_a_file_that_is_not_there(self, tmp_path, capsys):
        error = self.refused(capsys, "build", "--set", "demo", "--sets", tmp_path / "nowhere.toml")
        assert "cannot read" in error and "name a file with --sets" in error

    @NEEDS_IT
    def test_a_set_is_what_its_options_are(self, place, sets, capsys):
        argv = ["--set", "mine", "--sets", sets, "--engines", place.store]
        assert status_of(engines.main, "build", *argv) == 0
        said = capsys.readouterr()
        assert "3 engines of the set mine, 3 current" in said.err
        assert status_of(engines.main, "explain", *argv, "--only", "decode", "--", "--group", 8) == 0
        differences = last_line(capsys.readouterr().out)["differences"]
        assert differences == {f"decode {BACKEND}": [["batch", "1 to 6", "1 to 8"]]}


@pytest.mark.parametrize(
    "argv, status, words",
    [
        ([], 2, "usage: dfkd-engines build|list"),
        (["--help"], 0, "usage: dfkd-engines build|list"),
        (["rebuild"], 2, "error: unknown command rebuild"),
        (["list", "--enginse", "x"], 2, "unknown argument --enginse: did you mean --engines"),
        (["build", "--help"], 0, "judged against float64"),
        (["explain", "--help"], 0, "whether it is current"),
        (["verify", "--help"], 0, "status 1"),
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


@NEEDS_IT
def test_engines_of_another_machine_are_not_current(own, monkeypatch, capsys):
    monkeypatch.setattr("dfkd.compiled.requests.cpu_architecture", lambda: "cpu riscv64")
    assert run("explain", own) == 0
    fields = last_line(capsys.readouterr().out)["differences"][f"decode {BACKEND}"]
    assert fields == [["device", cpu_architecture(), "cpu riscv64"]]


@NEEDS_IT
def test_measurements_are_listed(own, capsys):
    set_facts(own.store, "decode", milliseconds={"engine": 12.5, "eager": 31.25, "rows": 6, "threads": 2})
    assert run("list", own) == 0
    row = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("decode"))
    assert row.split()[2:7] == ["here", "6", "float32", "12.5", "31.25"]
