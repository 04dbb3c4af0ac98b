"""What is seen while a command runs: a bar on a terminal, a line every half minute elsewhere."""

import io
import json
from pathlib import Path

import pytest

from dfkd.cli.progress import duration, progress
from dfkd.cli.run import log_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_another_stage_has_a_rate_of_its_own() -> None:
    out, clock = io.StringIO(), Clock()
    with progress("training", "img", stream=out, clock=clock) as draw:
        for seconds, done in ((0, 0), (300, 100), (301, 0), (340, 390)):
            clock.now = 100 + seconds
            draw(done, 1000)
    assert out.getvalue().splitlines()[-1] == "training: 390 of 1000 img, 10 img/s, 61 s left"
    with progress("training", "img", stream=(terminal := Terminal())) as draw:
        for done in (0, 900, 0, 100):
            draw(done, 1000)
    assert "10.0%" in terminal.getvalue().split("\r")[-1]


def test_elsewhere_a_line_every_half_minute(tmp_path: Path) -> None:
    out, clock, log = io.StringIO(), Clock(), tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 9}\n{"step": 50, "loss": 0.51234, "lr": 0.1}\n{"step": 50, "agreement": 0.5}\n{"s'
    )
    with progress("distilling", "img", log=log, stream=out, clock=clock) as draw:
        for seconds, done in ((0, 100), (29, 129), (31, 162), (40, 170), (61, 222.4), (62, 300)):
            clock.now = 100 + seconds
            draw(done, 300)
    assert out.getvalue().splitlines() == [
        # the rate is of this run: 62 images in 31 s
        "distilling: 162 of 300 img, 2 img/s, 69 s left, loss 0.512, agreement 0.5",
        "distilling: 222 of 300 img, 2.01 img/s, 39 s left, loss 0.512, agreement 0.5",
    ]


def test_nothing_done_yet_is_no_rate() -> None:
    out, clock = io.StringIO(), Clock()
    with progress("synthesis", "img", stream=out, clock=clock) as draw:
        draw(0, 8)
        clock.now += 45
        draw(0, 8)
    assert out.getvalue() == "synthesis: 0 of 8 img\n"


def test_on_a_terminal_a_bar_that_moves_by_parts_of_images(tmp_path: Path) -> None:
    out, log = Terminal(), tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 50, "loss": 0.25}) + "\n")
    with progress("synthesis", "img", log=log, stream=out) as draw:
        for done in (4, 6.66666, 12):
            draw(done, 12)
    assert "synthesis:" in out.getvalue() and "12/12" in out.getvalue() and "6.66666" not in out.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_of_several_processes_one_shows_it(stream: io.StringIO) -> None:
    with progress("distilling", "img", shown=False, stream=stream) as draw:
        draw(8, 32)
        draw(32, 32)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("stage", "log"),
    [
        ("teacher", "teacher"),
        ("images", "synthetic"),
        ("student", "student"),
        ("noise: images", "baselines/noise/synthetic"),
        ("noise: student", "baselines/noise/student"),
    ],
)
def test_the_numbers_beside_a_stage_are_its_own(stage: str, log: str) -> None:
    assert log_of(Path("run"), stage) == Path("run", log, "log.jsonl")


def test_seconds_in_words() -> None:
    words = [duration(seconds) for seconds in (0.4, 89, 91, 60 * 89, 60 * 90, 200 * 60)]
    assert words == ["0 s", "89 s", "2 min", "89 min", "1 h 30 min", "3 h 20 min"]
