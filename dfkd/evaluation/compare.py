"""Runs side by side as data: everything that report.json of `dfkd-report --compare` holds and its page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dfkd
from dfkd.data import Images
from dfkd.evaluation.entries import CEILING, Entries, ImageSet, Method, Point, own_name
from dfkd.evaluation.fidelity import Fidelity
from dfkd.evaluation.image_measures import Beside, Rank, Seen, look, measures, rank
from dfkd.evaluation.paired import Difference, difference, over_seeds
from dfkd.evaluation.tested import STRONG
from dfkd.evaluation.verdict import Answer
from dfkd.teachers import Classifier

RIGHTLY = 0.8  # rank correlation from which a measure is said to rank rightly


@dataclass(frozen=True)
class Students:
    """A method's students: accuracy, the mean over the seeds at the largest budget, and each of them.

    behind: by budget, how far they are ahead of the reference's (below 0: behind), and over how many pairs of one seed.
    Of one student each, whatever the seeds, the interval is for the choice of test images, if both runs kept which they
    have right.
    """

    accuracy: float | None
    points: tuple[Point, ...]
    behind: tuple[tuple[float | None, Difference, int], ...]


@dataclass(frozen=True)
class Comparison:
    """reference: the method that others are compared with. networks: whose features, by name. real: real images beside
    as many others of them, by network. judged: images of each set, 0 where none was looked at.
    """

    title: str
    version: str
    reference: str
    test: str | None
    split: str | None
    test_images: int | None
    data: str | None
    judged: int
    class_names: tuple[str, ...]
    image_size: int | None
    networks: Mapping[str, str]
    notes: tuple[str, ...]
    students: Mapping[str, Students]
    images: Mapping[str, tuple[Seen, ...]]
    real: Mapping[str, Fidelity]
    ranks: tuple[Rank, ...]
    answers: tuple[Answer, ...]

    @property
    def ranking(self) -> list[str]:
        """Methods by accuracy, the best first."""
        return sorted(self.students, key=lambda name: -(self.students[name].accuracy or 0.0))

    @property
    def budgets(self) -> list[float | None]:
        """Each once, from the smallest."""
        found = {point.budget for one in self.students.values() for point in one.points}
        return sorted(found, key=lambda budget: -1.0 if budget is None else budget)


def compare(
    entries: Entries,
    teachers: Sequence[Classifier | None],
    networks: Mapping[str, Classifier],
    real: Images | None,
    data: str | None,
    count: int,
    notes: Sequence[str] = (),
) -> Comparison:
    """Measure what was read.

    teachers: of every set, in the order of `entries.sets`. networks: whose features, by a name for people. real: images
    to compare with, as `check_real` lets them pass, which `data` names. count: images of each set that are judged,
    spread over classes and ids. notes: what a reader must know besides.
    """
    sets, names = entries.sets, entries.class_names
    beside = Beside.of(real, names, networks, count) if real is not None else None
    of_set = {id(one): teacher for one, teacher in zip(sets, teachers, strict=True)}
    seen = {
        name: tuple(look(one, of_set[id(one)], beside, count) for one in method.sets)
        for name, method in entries.methods.items()
        if count and method.sets
    }
    students = {name: _students(method, entries.methods[entries.reference]) for name, method in entries.methods.items()}
    accuracies = {name: one.accuracy for name, one in students.items()}
    ranks = rank(measures(list(networks) if beside else ()), seen, accuracies)
    test, split, images = entries.test or (None, None, None)
    return Comparison(
        title=", ".join(list(entries.methods)[:3]) + (", …" if len(entries.methods) > 3 else ""),
        version=dfkd.__version__,
        reference=entries.reference,
        test=test,
        split=split,
        test_images=images,
        data=data,
        judged=count,
        class_names=names,
        image_size=sets[0].pool.image_size if sets else None,
        networks={
            name: f"{one.architecture or one.source}, fed {one.input_size} x {one.input_size} pixels"
            for name, one in (networks if beside else {}).items()
        },
        notes=(*notes, *_notes(sets, teachers)),
        students=students,
        images=seen,
        real=beside.others() if beside else {},
        ranks=tuple(ranks),
        answers=tuple(_answers(entries, students, ranks)),
    )


def _students(method: Method, reference: Method) -> Students:
    behind: list[tuple[float | None, Difference, int]] = []
    for budget in method.budgets if method is not reference else ():
        own, theirs = method.at(budget), reference.at(budget)
        seeds = [seed for seed in own if seed in theirs]
        masks = [mask for of in (method, reference) for mask in of.right.values()]
        if len(own) == len(theirs) == 1 and budget is None and len(masks) == 2:  # whatever their seeds
            behind.append((budget, difference(*masks), 1))
        elif seeds:
            first, second = ([of[seed].accuracy for seed in seeds] for of in (own, theirs))
            behind.append((budget, over_seeds(first, second), len(seeds)))
    return Students(method.accuracy, method.points, tuple(behind))


def _notes(sets: Sequence[ImageSet], teachers: Sequence[Classifier | None]) -> list[str]:
    """What a reader must know before trusting the page: parts that do not belong together."""
    notes = []
    guides = [one.pool.settings.get("teacher_digest") for one in sets]
    of_seed = {(one.seed, guide) for one, guide in zip(sets, guides, strict=True) if guide is not None}
    if len(of_seed) > len({seed for seed, _ in of_seed}):
        notes.append(
            "Images of one seed were made with different teachers: their students learned from others' answers."
        )
    digests = {id(teacher): teacher.digest() for teacher in teachers if teacher is not None}
    if any(
        guide and teacher and guide != digests[id(teacher)] for guide, teacher in zip(guides, teachers, strict=True)
    ):
        notes.append("Some images are judged by another teacher than the one that they were made with.")
    return notes


def _answers(entries: Entries, students: Mapping[str, Students], ranks: Sequence[Rank]) -> list[Answer]:
    """What a reader came for, in plain words."""
    reference = entries.reference
    name = reference.replace("_", " ")
    question = f"Is {name} ahead of every other?"
    rivals = {other: one for other, one in students.items() if other != reference and own_name(other) != CEILING}
    short, text = _ahead(rivals)
    if missing := set(STRONG) - {entries.methods[other].control for other in rivals if students[other].points}:
        text += f" Without {' and '.join(sorted(missing))} beside it nothing can be put down to guided diffusion."
    found = [Answer(question, short, text)]
    if known := [one for one in ranks if one.correlation is not None]:
        best = max(known, key=lambda one: one.correlation or 0.0)
        where = f" in the features of {best.features}" if best.features else ""
        text = (
            f"Those with a rank correlation (Spearman's) of {RIGHTLY} or more over {best.methods} methods. Highest:"
            f" {best.measure}{where}, {best.correlation:+.2f}. 1 is the students' order; of few methods it may be luck."
        )
        rightly = sum((one.correlation or 0.0) >= RIGHTLY for one in known)
        short = f"{rightly} of {len(known)} do"
        found.append(Answer("Do measures of the images rank the students rightly?", short, text))
    return found


def _ahead(students: Mapping[str, Students]) -> tuple[str, str]:
    """In a few words whether the reference is ahead of all at every budget; and the nearest one at each."""
    at: dict[float | None, list[tuple[Difference, str]]] = {}
    for other, one in students.items():
        for budget, gap, _ in one.behind:
            at.setdefault(budget, []).append((gap, other.replace("_", " ")))
    ahead = [all(gap.high < 0 for gap, _ in gaps) for gaps in at.values()]
    behind = [any(gap.low > 0 for gap, _ in gaps) for gaps in at.values()]
    unpaired = [other.replace("_", " ") for other, one in students.items() if one.points and not one.behind]
    told = []
    for budget, gaps in at.items():
        gap, other = max(gaps, key=lambda pair: pair[0].value)
        between = f" ({_points(-gap.high)} to {_points(-gap.low)})" if gap.known else ""
        told.append(f"{f'{budget:g} s: ' if budget else ''}{_points(-gap.value)}{between}, {other}")
    shown = f"at {sum(ahead)} of {len(at)} budgets" if len(at) > 1 and 0 < sum(ahead) < len(at) else ""
    short = "yes" if all(ahead) and not unpaired else shown or ("no" if any(behind) else "not shown")
    alone = f" No seed in common with it: {', '.join(unpaired)}." if unpaired else ""
    if not told:
        return "not shown", alone.lstrip() or "No other method was tested."
    known = all(gap.known for gaps in at.values() for gap, _ in gaps)
    what = "Points ahead of the one that comes nearest" + (", with the 95 % interval" if known else "")
    rule = "Ahead of all is where every interval leaves zero out" + ("" if known else "; one seed has none") + "."
    return short, f"{what}: {'; '.join(told)}. {rule}{alone}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")
