"""What is measured of sets of images beside one another, and whether it ranks their students rightly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dfkd.data import Images
from dfkd.errors import UsageError
from dfkd.evaluation.accuracy import match_classes, spread
from dfkd.evaluation.entries import ImageSet
from dfkd.evaluation.fidelity import LEAST, Fidelity, features, fidelity
from dfkd.evaluation.metrics import TeacherView, teacher_view
from dfkd.teachers import Classifier

FEWEST = 3  # methods of which a rank correlation is stated


@dataclass(frozen=True)
class Seen:
    """The images of one seed. judged: how many were looked at, as many of each set. view: what their teacher makes of
    them, None without one. fidelity: by the name of the network whose features are taken, {} without real images."""

    seed: int
    images: int
    judged: int
    accuracy: float | None
    view: TeacherView | None
    fidelity: Mapping[str, Fidelity]


@dataclass(frozen=True)
class Rank:
    """Whether a measure puts methods in the order of their students: Spearman's rank correlation, 1 for the same order
    and -1 for the opposite one, None where all are equal. best: the method that it puts first."""

    measure: str
    features: str | None
    correlation: float | None
    methods: int
    best: str


@dataclass(frozen=True)
class Measure:
    """A number of a set of images. better: 1 where more is better, -1 where less is. share: in 0..1."""

    name: str
    better: int
    share: bool
    read: Callable[[Seen], float | None]
    features: str | None = None


@dataclass(frozen=True)
class Beside:
    """Real images as networks see them. features: by network, of `count` images, then of as many others where there
    are so many. labels: as many, by the sets' classes."""

    networks: Mapping[str, Classifier]
    features: Mapping[str, Tensor]
    labels: Tensor
    count: int

    @classmethod
    def of(cls, real: Images, names: Sequence[str], networks: Mapping[str, Classifier], count: int) -> "Beside":
        """real: images that `check_real` lets pass."""
        labels = match_classes(real, names)[real.labels]
        sets = 2 if len(labels) >= 2 * count else 1
        rows = spread(labels, sets * count).view(-1, sets).T.flatten()  # the two take turns: alike by class
        found = {name: features(one, real.read, rows) for name, one in networks.items()}
        return cls(networks, found, labels[rows], count)

    def fidelity(self, pool_rows: Tensor, one: ImageSet) -> dict[str, Fidelity]:
        """Of some images of a set."""
        labels = one.pool.labels[pool_rows]
        return {
            name: fidelity(features(network, one.pool.read, pool_rows), labels, *self._first(name))
            for name, network in self.networks.items()
        }

    def others(self) -> dict[str, Fidelity]:
        """Of the other real images: what a perfect set would have; {} where there are too few."""
        if len(self.labels) == self.count:
            return {}
        labels = self.labels[self.count :]
        return {name: fidelity(self.features[name][self.count :], labels, *self._first(name)) for name in self.networks}

    def _first(self, name: str) -> tuple[Tensor, Tensor]:
        return self.features[name][: self.count], self.labels[: self.count]


def check_real(real: Images, names: Sequence[str], count: int) -> None:
    """Raise UsageError for real images of other classes, and fewer of them than `count`, as many as it takes."""
    match_classes(real, names)
    if count < LEAST:
        what = f"{count} images of each set are judged"
        raise UsageError(what, f"distances to real ones take {LEAST}", "raise --judged, or make more images")
    if len(real.labels) < count:
        what = f"there are {len(real.labels)} real images, and {count} of each set are judged"
        raise UsageError(what, "both are as many", f"give --judged {len(real.labels)}, or more images as --data")


def measures(networks: Sequence[str]) -> list[Measure]:
    """What is measured of a set, in the order of the page's columns."""

    def of_teacher(key: str) -> Callable[[Seen], float | None]:
        return lambda seen: None if seen.view is None else getattr(seen.view, key)

    def of_features(name: str, key: str) -> Callable[[Seen], float | None]:
        return lambda seen: None if name not in seen.fidelity else getattr(seen.fidelity[name], key)

    found = [
        Measure("agrees", 1, True, of_teacher("agreement")),
        Measure("confidence", 1, True, of_teacher("probability")),
        Measure("BN gap", -1, False, of_teacher("gap")),
    ]
    for name in networks:
        found += [
            Measure("Frechet", -1, False, of_features(name, "frechet"), name),
            Measure("precision", 1, True, of_features(name, "precision"), name),
            Measure("recall", 1, True, of_features(name, "recall"), name),
            Measure("diversity", 1, False, of_features(name, "diversity"), name),
        ]
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def look(one: ImageSet, teacher: Classifier | None, beside: Beside | None, count: int) -> Seen:
    """Measure `count` images of a set, spread over its classes and ids."""
    rows = spread(one.pool.labels, count)
    return Seen(
        seed=one.seed,
        images=len(one.pool.labels),
        judged=count,
        accuracy=one.accuracy,
        view=teacher_view(teacher, one.pool.read, one.pool.labels, rows) if teacher else None,
        fidelity=beside.fidelity(rows, one) if beside else {},
    )


def rank(
    all_measures: Sequence[Measure], seen: Mapping[str, Sequence[Seen]], accuracies: Mapping[str, float | None]
) -> list[Rank]:
    """How each measure's order of methods, means over their seeds, fits that of their students; [] of less than FEWEST.

    accuracies: of the methods, where their images' own students were not tested.
    """
    from scipy import stats

    found = []
    for measure in all_measures:
        rows = []
        for name, sets in seen.items():
            value, own = mean([measure.read(one) for one in sets]), mean([one.accuracy for one in sets])
            accuracy = accuracies[name] if own is None else own
            if value is not None and accuracy is not None:
                rows.append((name, measure.better * value, accuracy))
        if len(rows) < FEWEST:
            continue
        names, values, right = zip(*rows, strict=True)
        even = len(set(values)) == 1 or len(set(right)) == 1
        correlation = None if even else float(stats.spearmanr(values, right).statistic)
        found.append(Rank(measure.name, measure.features, correlation, len(rows), names[values.index(max(values))]))
    return found
