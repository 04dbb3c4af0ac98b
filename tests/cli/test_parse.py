"""Settings classes drive flags, presets, files, help and checks; every wrong input says what, why and what to do."""

import errno
import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest

from dfkd import __main__ as program
from dfkd.cli.parse import command, parse, save_settings
from dfkd.config import (
    DistillCommand,
    EvaluateCommand,
    ExportCommand,
    GenerateCommand,
    ReportCommand,
    RunCommand,
    TrainTeacherCommand,
    fields,
)
from dfkd.config.fields import Config, nested, option, plain
from dfkd.errors import Stopped, UsageError


@dataclass(frozen=True, kw_only=True)
class Oven(Config):
    """Oven: how the cake is baked

    More about it.
    """

    EXAMPLE = "--heat 200 --hours 2"
    EXCLUSIVE = (("minutes", "hours"),)

    heat: float = option(180.0, "how hot", low=0, unit="degrees")
    minutes: int | None = option(30, "how long", low=1)
    hours: int | None = option(None, "how long", low=1)


@dataclass(frozen=True, kw_only=True)
class Cake(Config):
    """Bake a cake.

    With as many layers as asked for.
    """

    SECTION = "cake"

    layers: int = option(3, "how many layers", low=1, high=9, unit="layers")
    out: Path = option(MISSING, "folder to write")
    filling: str = option("jam", "what is between, 100% sweet", choices=("jam", "cream"), extensible=True)
    toppings: tuple[str, ...] = option((), "what is on top", choices=("nuts", "fruit"))
    spots: tuple[float, ...] | None = option(None, "where")
    candle: float | None = option(None, "height of the candle", unit="cm", flag="candle_height")
    glaze: bool = option(True, "glaze it")
    oven: Oven = nested(Oven, heat=190.0)

    def validate(self) -> None:
        if self.filling == "cream" and self.oven.heat > 200:
            raise ValueError(f"--heat is {self.oven.heat}: cream curdles above 200")


@pytest.fixture(autouse=True)
def tall(tmp_path, monkeypatch):
    """Presets of cakes instead of the project's."""
    monkeypatch.setattr(fields, "PRESETS", folder := tmp_path / "presets")
    folder.mkdir()
    (folder / "tall.toml").write_text(
        'description = "nine layers"\n[cake]\nlayers = 9\ntoppings = ["nuts"]\ncandle-height = 4\nhours = 1\n'
        "[other]\nunknown = 1\n"
    )
    (folder / "flat.toml").write_text('description = "no layers"\n[cake]\nlayers = 0\n')
    (folder / "odd.toml").write_text('description = "odd"\n[cake]\nlayer = 2\n')


def bake(*argv: str) -> Cake:
    return parse(Cake, argv, "dfkd-cake")


def complaint(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        bake(*argv)
    return str(caught.value)


def test_defaults_and_types() -> None:
    assert bake("--out", "x") == Cake.of(out="x")
    assert bake("--out", "x").oven.heat == 190.0
    flags = "--out=x --layers 5 --heat 2e2 --toppings nuts,fruit --candle_height 3 --no-glaze --filling my.py:Plum(a=1)"
    assert bake(*flags.split()) == Cake.of(
        out="x", layers=5, heat=200, toppings=("nuts", "fruit"), candle_height=3, glaze=False, filling="my.py:Plum(a=1)"
    )


def test_lists_are_given_in_either_way() -> None:
    for flags in ("--toppings nuts,fruit", "--toppings nuts fruit", "--toppings nuts --toppings fruit"):
        assert bake("--out", "x", *flags.split()).toppings == ("nuts", "fruit")
    assert bake("--out", "x", "--spots", "0.5,1", "2").spots == (0.5, 1.0, 2.0)


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    config = tmp_path / "cake.toml"
    config.write_text('layers = 7\nfilling = "cream"\ntoppings = ["fruit"]\nout = "from-file"\n')
    asked = bake("--layers", "2", "--preset", "tall", "--config", str(config))
    assert (asked.layers, asked.filling, asked.toppings, asked.candle) == (2, "cream", ("fruit",), 4.0)
    assert bake("--preset", "tall", "--out", "x").layers == 9
    assert bake("--preset", "tall", "--config", str(config), "--candle-height", "none").candle is None


def test_of_exclusive_options_the_last_source_counts() -> None:
    assert bake("--out", "x", "--preset", "tall").oven == Oven(heat=190.0, minutes=None, hours=1)
    assert bake("--out", "x", "--preset", "tall", "--minutes", "5").oven == Oven(heat=190.0, minutes=5, hours=None)


def test_a_file_may_be_a_run_file_or_settings_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[cake]\nlayers = 7\n[teacher]\nlayers = 1\n")
    assert bake("--out", "x", "--config", str(tmp_path / "run.toml")).layers == 7
    asked = bake("--out", "x", "--preset", "tall", "--spots", "1", "--no-glaze")
    path = save_settings(asked, tmp_path, "dfkd-cake")
    assert bake("--config", str(path)) == asked
    assert bake("--config", str(path), "--minutes", "9").oven.hours is None
    with pytest.raises(UsageError, match="is of dfkd-cake: this is dfkd-bread"):
        parse(Cake, ["--config", str(path)], "dfkd-bread")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", ("--out is missing", "folder to write", "dfkd-cake --help")),
        ("--out x --layers 10", ("--layers is '10'", "at most 9")),
        ("--out x --layers 0", ("--layers is '0'", "at least 1")),
        ("--out x --layers 2.5", ("--layers is '2.5'", "whole number")),
        ("--out x --heat nan", ("--heat is 'nan'", "finite")),
        ("--out x --heat hot", ("--heat is 'hot'", "a number")),
        ("--out x --filling mud", ("--filling is 'mud'", "jam, cream", "FILE.py:NAME")),
        ("--out x --toppings nuts,mud", ("--toppings is 'nuts,mud'", "nuts, fruit")),
        ("--out x --layer 4", ("--layer", "did you mean --layers")),
        ("--out x --output-dir=4", ("--output-dir", "did you mean --out.")),
        ("--out x --oven 4", ("unknown argument --oven",)),
        ("--out x stray", ("stray",)),
        ("--out", ("--out", "expected one argument")),
        ("--out x --preset tal", ("unknown preset 'tal'", "did you mean tall")),
        ("--out x --preset flat", ("preset flat: layers is 0", "at least 1")),
        ("--out x --preset odd", ("preset odd: unknown option 'layer'", "did you mean layers")),
        ("--out x --config absent.toml", ("absent.toml", "No such file")),
        ("--out x --filling cream --heat 220", ("cream curdles above 200",)),
    ],
)
def test_what_is_wrong_is_named(argv: str, words: tuple[str, ...]) -> None:
    message = complaint(*argv.split())
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer = 3", ("'layer'", "did you mean layers")),
        ("layers = 12", ("layers is 12", "at most 9")),
        ("layers = true", ("layers is True", "whole number")),
        ("glaze = 1", ("glaze is 1", "true or false")),
        ("filling = 3", ("filling is 3", "text")),
        ("toppings = [1]", ("toppings is [1]", "names")),
        ("[kitchen]\nheat = 1", ("unknown option 'kitchen'",)),
        ("layers = ", ("TOML",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    config = tmp_path / "cake.toml"
    config.write_text(text)
    message = complaint("--out", "x", "--config", str(config))
    assert all(word in message for word in (str(config), *words)), message


@pytest.mark.parametrize(
    ("cls", "flag", "meant"),
    [
        (GenerateCommand, "--guidance-scale", "--cfg"),
        (GenerateCommand, "--guidance_scale=3", "--cfg"),
        (GenerateCommand, "--num-inference-steps", "--steps"),
        (GenerateCommand, "--class", "--only"),
        (GenerateCommand, "--class-name", "--only"),
        (GenerateCommand, "--num-images", "--count"),
        (GenerateCommand, "--model", "--teacher"),
        (GenerateCommand, "--pretrained", "--teacher-checkpoint"),
        (GenerateCommand, "--pretrained_model_name_or_path", "--prior"),
        (GenerateCommand, "--height", "--size"),
        (DistillCommand, "--learning-rate", "--lr"),
        (DistillCommand, "--model", "--student"),
        (EvaluateCommand, "--weights", "--checkpoint"),
        (EvaluateCommand, "--ckpt", "--checkpoint"),
        (EvaluateCommand, "--checkpoint-path", "--checkpoint"),
        (ExportCommand, "--model", "--checkpoint"),
        (DistillCommand, "--output", "--out"),
        (TrainTeacherCommand, "--model", "--architecture"),
        (TrainTeacherCommand, "--sched", "--schedule"),
        (TrainTeacherCommand, "--data-dir", "--data"),
    ],
)
def test_other_programs_words_are_pointed_to_ours(cls: type[Config], flag: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(cls, ["--out", "x", flag, "3"], "dfkd-it")
    assert f"did you mean {meant}." in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "argv", "message"),
    [
        (RunCommand, "--file x.toml", "unknown argument --file: the file is given without a flag. See dfkd-it --help."),
        (DistillCommand, "--out x --height 3", "unknown argument --height. See dfkd-it --help."),
    ],
)
def test_no_flag_is_suggested_where_none_is_meant(cls: type[Config], argv: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(cls, argv.split(), "dfkd-it")
    assert str(caught.value) == message


COMMANDS = (
    DistillCommand, EvaluateCommand, ExportCommand, GenerateCommand, ReportCommand, RunCommand, TrainTeacherCommand
)  # fmt: skip


@pytest.mark.parametrize("cls", COMMANDS)
def test_help_shows_no_path_of_this_machine(cls: type[Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], "dfkd-it")
    assert not re.findall(r"[\s(=]/\w+", capsys.readouterr().out)


def test_presets_are_offered_only_where_they_set_something() -> None:
    with pytest.raises(UsageError, match="unknown argument --preset"):
        parse(Oven, ["--preset", "tall"], "dfkd-oven")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bake("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in (
        "usage: dfkd-cake --out PATH [options]",
        "Bake a cake. With as many layers",
        "how many layers (1 to 9 layers; default 3)",
        "folder to write (required)",
        "Oven: how the cake is baked: example: --heat 200 --hours 2",
        "how hot (at least 0 degrees; default 190.0)",
        "what is between, 100% sweet (one of jam, cream or FILE.py:NAME; default jam)",
        "height of the candle (cm; default none)",
        "--glaze, --no-glaze glaze it (default on)",
        "tall nine layers",
    ):
        assert words in text, text


class TestCommand:
    def run(self, result: Any, *argv: str) -> int:
        def work(options: Cake) -> dict[str, Any]:
            if isinstance(result, BaseException):
                raise result
            print("on the way")
            return dict(result)

        return command(Cake, work, "dfkd-cake", argv)

    def test_the_last_line_is_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        values = {"path": Path("a/b"), "pair": (1, 2), "loss": float("nan"), "deep": {"x": [float("inf")]}}
        assert self.run(values, "--out", "x") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert json.loads(last) == {"path": "a/b", "pair": [1, 2], "loss": None, "deep": {"x": [None]}}

    @pytest.mark.parametrize("argv", [("--out", "x"), ("--out", "x", "--layers", "0")])
    def test_what_the_user_can_put_right(self, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(UsageError("the oven is cold", "it is off", "Turn it on"), *argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        if len(argv) == 2:
            assert captured.err == "error: the oven is cold: it is off. Turn it on.\n"

    def test_interrupted_and_stopped(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(KeyboardInterrupt(), "--out", "x") == 130
        assert self.run(Stopped(15, "half baked"), "--out", "x") == 143
        captured = capsys.readouterr()
        assert captured.out == "" and "half baked" in captured.err

    @pytest.mark.parametrize("debug", ["0", "1"])
    def test_a_fault_of_ours_is_one_line_and_a_traceback_where_asked(
        self, debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("DFKD_DEBUG", debug)
        assert self.run(ZeroDivisionError("by zero\nmore"), "--out", "x") == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ZeroDivisionError: by zero. ") and "DFKD_DEBUG=1" in lines[-1]
        assert (len(lines) > 1) == ("Traceback (most recent call last):" in lines) == (debug == "1")

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (
                OSError(errno.ENOSPC, "No space left on device", "cake.tar"),
                "cannot use cake.tar: No space left on device",
            ),
            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. make room, then start again"),
            (
                OSError(errno.EROFS, "Read-only file system", "x"),
                "x: Read-only file system. choose a place that can be",
            ),
            (PermissionError(errno.EACCES, "Permission denied", "x"), "choose a place that can be read and written"),
            (OSError(errno.EMFILE, "Too many open files", "x"), "raise the limit (ulimit -n"),
            (FileNotFoundError(errno.ENOENT, "No such file or directory", "flour"), "cannot use flour: No such file"),
        ],
    )
    def test_what_the_system_refuses_is_no_fault_of_the_program(
        self, error: OSError, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(error, "--out", "x") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line and "fault" not in line

    def test_an_error_that_only_inherits_from_oserror_is_ours(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(OSError("no errno"), "--out", "x") == 1
        assert "a fault of the program" in capsys.readouterr().err

    def test_a_setting_that_is_refused_late_is_the_users(self, capsys: pytest.CaptureFixture[str]) -> None:
        def work(asked: Cake) -> dict[str, Any]:
            return asked.replace(filling="cream", heat=300).flat()

        assert command(Cake, work, "dfkd-cake", ("--out", "x")) == 2
        assert capsys.readouterr().err == "error: --heat is 300.0: cream curdles above 200\n"

    def test_arguments_come_from_the_command_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["dfkd-cake", "--out", "seen"])
        seen: list[Path] = []
        assert command(Cake, lambda asked: seen.append(asked.out) or {}, "dfkd-cake") == 0
        assert seen == [Path("seen")]


def test_settings_are_the_same_however_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('out = "x"\nlayers = 9\n')
    by_file = save_settings(bake("--config", str(tmp_path / "c.toml")), tmp_path / "a", "cake").read_bytes()
    by_flag = save_settings(bake("--layers=9", "--out", "x"), tmp_path / "b", "cake").read_bytes()
    assert by_file == by_flag
    saved = json.loads(by_file)
    assert saved["options"] == plain(bake("--layers=9", "--out", "x").flat())
    assert saved["versions"].keys() == {"dfkd", "diffusers", "torch"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["settings.json"]


def test_usage_error_reads_as_a_sentence() -> None:
    assert str(UsageError("a")) == "a."
    assert str(UsageError("a", "b")) == "a: b."
    assert str(UsageError("a.", "b", "Do c.")) == "a: b. Do c."
    assert str(UsageError("a", todo="Do c")) == "a. Do c."


def test_python_m_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--help"])
    assert "train-teacher" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        program.main(["genrate"])
    assert stopped.value.code == 2
    assert "did you mean generate" in capsys.readouterr().err
