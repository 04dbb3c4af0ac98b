"""The benchmark of mSARC: its table says what the seeds say."""

import pytest

from benchmarks.msarc import markdown


def result(better: list[float]) -> dict:
    def row(name: str, weight: float, accuracy: list[float], steps: list[int]) -> dict:
        seconds = [4.0, 5.0, 6.0]
        return {"name": name, "weight": weight, "accuracy": accuracy, "steps": steps, "seconds": seconds} | {
            "median": sorted(accuracy)[1]
        }

    rows = [
        row("without", 0.0, [0.8, 0.7, 0.9], [260] * 3),
        row("weight 1", 1.0, [0.1, 0.1, 0.1], [260] * 3),
        row("weight 10", 10.0, better, [260] * 3),
        row("without, equal seconds", 0.0, [0.9, 0.9, 0.9], [500, 480, 520]),
    ]
    machine = {"device": "a CPU", "threads": 2, "versions": {"torch": "2.13"}, "date": "2026-11-24"}
    return {"rows": rows, "machine": machine}


@pytest.mark.parametrize(
    ("better", "words"),
    [
        ([0.81, 0.71, 0.91], "mSARC improves: with weight 10 it is +1.0 +1.0 +1.0 points"),
        ([0.79, 0.7, 0.85], "mSARC does not improve: with weight 10 it is -1.0 +0.0 -5.0 points"),
        ([0.79, 0.75, 0.95], "mSARC improves for some seeds and not for others"),
    ],
)
def test_the_verdict_is_of_every_seed(better: list[float], words: str) -> None:
    lines = markdown(result(better)).splitlines()
    assert lines[2] == "| without | 80.0 % | 80.0 70.0 90.0 | 260 | 5.0 |"
    assert lines[5] == "| without, equal seconds | 90.0 % | 90.0 90.0 90.0 | 480 to 520 | 5.0 |"
    assert words in lines[-1]
