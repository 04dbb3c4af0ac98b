"""One dataclass drives flags, presets, TOML, help and checks; every wrong input says what, why and what to do."""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from dfkd.cli import options as options_module
from dfkd.cli.options import command, option, parse, plain, save_settings
from dfkd.errors import UsageError
from dfkd.presets import Preset


@dataclass(frozen=True)
class Options:
    """Bake a cake.

    With as many layers as asked for.
    """

    layers: int = option(3, "how many layers", low=1, high=9, unit="layers")
    out: Path = option(MISSING, "folder to write")
    heat: float = option(180.0, "oven", low=0, unit="degrees")
    filling: str = option("jam", "what is between, 100% sweet", choices=("jam", "cream"))
    toppings: tuple[str, ...] = option((), "what is on top", choices=("nuts", "fruit"))
    candle: float | None = option(None, "height of the candle", unit="cm")
    glaze: bool = option(True, "glaze it")

    def __post_init__(self) -> None:
        if self.filling == "cream" and self.heat > 200:
            raise ValueError(f"heat is {self.heat}: cream curdles above 200")


PRESETS = {"tall": Preset("nine layers", generate={"layers": 9, "toppings": ("nuts",), "candle": 4.0})}


def bake(*argv: str, presets: dict[str, Preset] = PRESETS) -> Options:
    return parse(Options, argv, "dfkd-generate", presets)


def complaint(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        bake(*argv)
    return str(caught.value)


def test_defaults_and_types() -> None:
    assert bake("--out", "x") == Options(out=Path("x"))
    flags = "--out=x --layers 5 --heat 2e2 --toppings nuts,fruit --candle 3 --no-glaze"
    given = bake(*flags.split())
    assert given == Options(out=Path("x"), layers=5, heat=200.0, toppings=("nuts", "fruit"), candle=3.0, glaze=False)


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    config = tmp_path / "cake.toml"
    config.write_text('layers = 7\nfilling = "cream"\ntoppings = ["fruit"]\nout = "from-file"\n')
    asked = bake("--layers", "2", "--preset", "tall", "--config", str(config))
    assert (asked.layers, asked.filling, asked.toppings, asked.candle) == (2, "cream", ("fruit",), 4.0)
    assert bake("--preset", "tall", "--out", "x").layers == 9
    assert bake("--preset", "tall", "--config", str(config), "--candle", "none").candle is None


def test_toml_keys_may_be_written_with_either_dash(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Two:
        """."""

        batch_size: int = option(1, "size")

    for key in ("batch-size", "batch_size"):
        (tmp_path / "c.toml").write_text(f"{key} = 4\n")
        assert parse(Two, ["--config", str(tmp_path / "c.toml")], "x", {}).batch_size == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ("--out is missing", "folder to write", "dfkd-generate --help")),
        (["--out", "x", "--layers", "10"], ("--layers is 10", "at most 9")),
        (["--out", "x", "--layers", "0"], ("--layers is 0", "at least 1")),
        (["--out", "x", "--layers", "2.5"], ("--layers is '2.5'", "whole number")),
        (["--out", "x", "--heat", "nan"], ("--heat is 'nan'", "finite")),
        (["--out", "x", "--heat", "hot"], ("--heat is 'hot'", "a number")),
        (["--out", "x", "--filling", "mud"], ("--filling is 'mud'", "jam, cream")),
        (["--out", "x", "--toppings", "nuts,mud"], ("--toppings is 'mud'", "nuts, fruit")),
        (["--out", "x", "--layer", "4"], ("--layer", "did you mean --layers")),
        (["--out", "x", "--oven", "4"], ("--oven", "known are", "--heat")),
        (["--out", "x", "stray"], ("stray",)),
        (["--out"], ("--out", "expected one argument")),
        (["--out", "x", "--preset", "tal"], ("unknown preset 'tal'", "did you mean tall")),
        (["--out", "x", "--config", "absent.toml"], ("absent.toml", "No such file")),
        (["--out", "x", "--filling", "cream", "--heat", "220"], ("cream curdles above 200",)),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], words: tuple[str, ...]) -> None:
    message = complaint(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer = 3", ("layer", "did you mean layers")),
        ("layers = 12", ("layers is 12", "at most 9")),
        ("layers = true", ("layers is True", "whole number")),
        ("glaze = 1", ("glaze is 1", "true or false")),
        ("filling = 3", ("filling is 3", "text")),
        ("toppings = [1]", ("toppings is [1]", "names")),
        ("[oven]\nheat = 1", ("unknown option 'oven'",)),
        ("layers = ", ("not TOML",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    config = tmp_path / "cake.toml"
    config.write_text(text)
    message = complaint("--out", "x", "--config", str(config))
    assert all(word in message for word in (str(config), *words)), message


def test_a_preset_is_checked_like_any_other_source() -> None:
    broken = {"flat": Preset("no layers", generate={"layers": 0})}
    with pytest.raises(UsageError, match="preset flat: layers is 0: it must be at least 1"):
        bake("--out", "x", "--preset", "flat", presets=broken)


def test_presets_are_offered_only_where_they_set_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="unknown argument --preset"):
        parse(Options, ["--out", "x", "--preset", "tall"], "dfkd-report", PRESETS)


@settings(deadline=None)  # a busy machine is not a failure
@drawn(st.integers(1, 9), st.floats(0, 1e6), st.sampled_from(["jam", "cream"]))
def test_flags_round_trip(layers: int, heat: float, filling: str) -> None:
    heat = min(heat, 200.0)
    asked = bake("--out", "x", f"--layers={layers}", f"--heat={heat!r}", "--filling", filling)
    assert (asked.layers, asked.heat, asked.filling) == (layers, heat, filling)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bake("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in (
        "Bake a cake. With as many layers",
        "how many layers (1 to 9 layers; default 3)",
        "folder to write (required)",
        "oven (at least 0 degrees; default 180.0)",
        "what is between, 100% sweet (one of jam, cream; default jam)",
        "height of the candle (cm; default none)",
        "--glaze, --no-glaze glaze it (default on)",
        "tall nine layers",
    ):
        assert words in text, text


class TestCommand:
    def run(self, result: Any, *argv: str) -> int:
        def work(options: Options) -> dict[str, Any]:
            if isinstance(result, BaseException):
                raise result
            print("on the way")
            return dict(result)

        return command(Options, work, "dfkd-report", argv)

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

    def test_interrupted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(KeyboardInterrupt(), "--out", "x") == 130
        assert capsys.readouterr().out == ""

    def test_a_fault_of_ours_is_not_dressed_up(self) -> None:
        with pytest.raises(ZeroDivisionError):
            self.run(ZeroDivisionError(), "--out", "x")

    def test_arguments_come_from_the_command_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(options_module.sys, "argv", ["dfkd-report", "--out", "seen"])
        seen: list[Path] = []
        assert command(Options, lambda asked: seen.append(asked.out) or {}, "dfkd-report") == 0
        assert seen == [Path("seen")]


def test_settings_are_the_same_however_they_were_given(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('out = "x"\nlayers = 9\n')
    by_file = save_settings(bake("--config", str(tmp_path / "c.toml")), tmp_path / "a", "cake").read_bytes()
    by_flag = save_settings(bake("--layers=9", "--out", "x"), tmp_path / "b", "cake").read_bytes()
    assert by_file == by_flag
    saved = json.loads(by_file)
    assert saved["options"] == plain(vars(bake("--layers=9", "--out", "x")))
    assert saved["versions"].keys() == {"dfkd", "diffusers", "torch"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["settings.json"]


def test_usage_error_reads_as_a_sentence() -> None:
    assert str(UsageError("a")) == "a."
    assert str(UsageError("a", "b")) == "a: b."
    assert str(UsageError("a.", "b", "Do c.")) == "a: b. Do c."
    assert str(UsageError("a", todo="Do c")) == "a. Do c."
