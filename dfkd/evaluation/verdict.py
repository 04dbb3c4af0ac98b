"""The answers that a reader came for, in plain words: the head of the page and the last lines of dfkd-run."""

import math
from dataclasses import dataclass

from dfkd.evaluation.cost import Cost
from dfkd.evaluation.paired import Difference
from dfkd.evaluation.tested import Accuracy, Errors

FEW_IMAGES = 1000  # a test of fewer is called small: the interval of a share is then wider than 3 points either way


@dataclass(frozen=True)
class Answer:
    """question, the answer in a few words, and what stands behind it. open: whether the run cannot answer it."""

    question: str
    short: str
    text: str
    open: bool = False


def answers(accuracy: Accuracy, errors: Errors | None, costs: dict[str, Cost]) -> tuple[Answer, ...]:
    """What a run says for a decision. costs: of "teacher" and "student", where they are known."""
    found = [_replacement(accuracy, errors), _sureness(accuracy), _guidance(accuracy)]
    if {"teacher", "student"} <= costs.keys():
        found.append(_saving(costs["student"], costs["teacher"]))
    return tuple(found)


def _replacement(accuracy: Accuracy, errors: Errors | None) -> Answer:
    question = "Can the student replace the teacher?"
    if accuracy.student is None:
        text = "Nothing says how good it is on real images: name some as data of [evaluate]."
        return Answer(question, "not tested", text, open=True)
    if accuracy.behind is None or accuracy.teacher is None:
        text = (
            f"It is right on {_percent(accuracy.student)} of the test images; the teacher was not tested on the same."
        )
        return Answer(question, _percent(accuracy.student), text, open=True)
    text = f"Right on {_percent(accuracy.student)} of the test images, the teacher on {_percent(accuracy.teacher)}."
    if errors is not None and (counts := errors.outcomes) is not None:
        total = accuracy.test_images
        text += f" The student alone is wrong on {_percent(counts.teacher_only / total)},"
        text += f" the teacher alone on {_percent(counts.student_only / total)}."
    return Answer(question, _gap(accuracy.behind, "behind", "ahead", "not told apart"), text)


def _sureness(accuracy: Accuracy) -> Answer:
    question = "How sure is that?"
    if accuracy.student is None or accuracy.interval is None:
        return Answer(question, "unknown", "There was no test on real images.", open=True)
    small = accuracy.test_images < FEW_IMAGES
    own = f"The student's own 95 % interval is {_range(*accuracy.interval)} %."
    if accuracy.behind is None:
        short = f"{_range(*accuracy.interval)} %"
    else:
        short = f"{_range(accuracy.behind.low, accuracy.behind.high)} points"
        own = f"That is the 95 % interval of the difference to the teacher. {own}"
    text = f"{own} From {accuracy.test_images} real {accuracy.split} images of {accuracy.test}"
    text += f", fewer than {FEW_IMAGES}: small differences cannot be seen" if small else ""
    text += "; another seed may differ by more."
    return Answer(question, short + (", a small test" if small else ""), text, open=small)


def _guidance(accuracy: Accuracy) -> Answer:
    question = "Is that due to the guided diffusion?"
    if missing := accuracy.missing_controls:
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        text = f"Controls that might do as well are missing ({why}). Start the same dfkd-run again, with --controls"
        text += f" {','.join(missing)}."
        return Answer(question, "unknown", text, open=True)
    if not accuracy.differences:
        text = "Which images each student has right was not kept: start dfkd-run again."
        return Answer(question, "unknown", text, open=True)
    name, least = min(accuracy.differences.items(), key=lambda item: item[1].low)
    short = _gap(least, f"behind {name}", f"ahead of {name}", f"not told apart from {name}")
    short = ("yes: " if least.low > 0 else "no: " if least.high < 0 else "not shown: ") + short
    others = [f"of {other} {_signed(gap)}" for other, gap in accuracy.differences.items()]
    text = "Points that the student on guided images is ahead, with 95 % intervals: " + "; ".join(others) + "."
    return Answer(question, short, text)


def _saving(student: Cost, teacher: Cost) -> Answer:
    pairs = (
        (_count(student.parameters), _count(teacher.parameters), "parameters"),
        (_count(student.flops, "FLOP"), _count(teacher.flops, "FLOP"), "an image"),
        (f"{student.milliseconds:.1f} ms", f"{teacher.milliseconds:.1f} ms", f"for one image ({student.device})"),
        (_count(student.bytes, "B"), _count(teacher.bytes, "B"), "of weights"),
    )
    text = "; ".join(f"{own} instead of {other} {what}" for own, other, what in pairs) + "."
    ratio = teacher.parameters / max(student.parameters, 1)
    short = f"{ratio:.1f}× fewer weights" if ratio > 1 else f"{1 / ratio:.1f}× more weights"
    return Answer("What does it save?", short if abs(ratio - 1) > 0.05 else "nothing: as many weights", text)


def _gap(found: Difference, below: str, above: str, level: str) -> str:
    if not found.shown:
        return level
    return f"{abs(100 * found.value):.1f} points {above if found.value > 0 else below}"


def _signed(found: Difference) -> str:
    return f"{100 * found.value:+.1f} ({_range(found.low, found.high)})".replace("-", "−")


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: float, unit: str = "") -> str:
    """70.7 k, 2.8 M, 4.1 G: with the prefix of its thousands."""
    power = min(int(math.log10(number)) // 3, 4) if number >= 1 else 0
    value = number / 1000**power
    return f"{value:.{1 if value < 100 else 0}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()
