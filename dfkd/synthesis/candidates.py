"""Several images for each that is kept, chosen by how teacher and student read them.

    L(T) = CE(T(x), y), L(S) = CE(S(x), y)      of an image as it is stored
    sure        the lowest L(T)
    medium      the median of L(T), the lower of two: neither the easiest images nor those that show something else
    learnable   the highest L(S) - w L(T): what the student has wrong and the teacher right (arXiv 2206.07137)

Candidate k of image i is the image i + k S of the method inside, with the label of image i. S is the largest number up
to 2^40 that is a multiple of the ids after which labels come again: the group times the classes, and with --teaching
each times the teachers. So a candidate has noise of its own, the teacher of image i, and CutMix partners among the
candidates k of its group. An image follows from (seed, id) alone, as without candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfkd.config import CandidatesConfig
from dfkd.errors import UsageError
from dfkd.synthesis.checks import copy_student
from dfkd.synthesis.losses import cross_entropy
from dfkd.synthesis.synthesizer import Around, Sample, Synthesizer, rounded
from dfkd.teachers import Classifier

SPAN = 1 << 40  # ids of the images of a run lie below


class Candidates(Around):
    """A synthesizer around another one: it makes `count` images for each that is asked for, and keeps one.

    teacher: frozen, on its device. student: that "learnable" goes by. rows: images per call of teacher or student.
    made: images that are made for one that is kept, 1 while "learnable" has no student.

    Raises UsageError: the method has no other images than those of its ids, or none of a label that is asked for;
    "learnable" has no student.
    """

    def __init__(
        self, inner: Synthesizer, config: CandidatesConfig, teacher: Classifier, student: Classifier | None, rows: int
    ) -> None:
        super().__init__(inner)
        if (images := getattr(inner, "available", None)) is not None:
            why = f"it has {images} images, each once"
            raise UsageError(f"--candidates {config.count} with --method {inner.name}", why, "leave it out")
        if not getattr(inner, "takes_labels", True):
            why = "its images have the class that the teacher sees, and candidates have one class"
            raise UsageError(f"--candidates {config.count} with --method {inner.name}", why, "leave it out")
        if config.takes_student and student is None:
            raise UsageError("--keep learnable has no student", "it is what a student has still wrong", "give one")
        self.own, self.teacher, self.rows = config, teacher, rows
        self.student = copy_student(student, teacher) if student is not None and config.takes_student else None
        turn = getattr(inner, "turn", 0) or inner.group * len(getattr(inner, "classes", inner.class_names))
        self.stride = SPAN // turn * turn

    @property
    def made(self) -> int:
        return 1 if self.own.takes_student and self.student is None else self.own.count

    def update(self, student: Classifier | None) -> None:
        """Choose by a newer student, and tell the method; None: there is none yet, and nothing is chosen."""
        if self.own.takes_student:
            self.student = None if student is None else copy_student(student, self.teacher)
        if hasattr(self.inner, "update"):
            self.inner.update(student)

    def identity(self) -> dict[str, Any]:
        """The method's, the settings of the choice, and the student that it goes by."""
        own = {"candidates": self.own.count, "keep": self.own.keep, "keep_weight": self.own.weight}
        judge = {"keep_student_digest": self.student.digest() if self.student else None}
        made = {"teacher_digest": self.teacher.digest(), **self.inner.identity()}  # which need not go by a teacher
        return {**made, **own, **(judge if self.own.takes_student else {})}

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        """The kept images `ids`, in that order, each with the number of its candidate and its score on record.

        Arguments and errors as of the method.
        """
        told, asked = getattr(self.inner, "on_progress", None), [int(i) for i in ids]
        samples: list[Sample] = []
        try:
            for k in range(self.made):
                if told is not None:
                    self.inner.on_progress = _part_of(told, k, self.made)  # type: ignore[attr-defined]
                samples.append(self.inner([i + k * self.stride for i in asked], labels, seed))
                labels = samples[0].labels.tolist()
        finally:
            if told is not None:
                self.inner.on_progress = told  # type: ignore[attr-defined]
        if len(samples) == 1:
            return samples[0]
        scores = torch.stack([self._scores(sample) for sample in samples])
        chosen = pick(scores, self.own.keep).tolist()
        images = torch.stack([samples[k].images[n] for n, k in enumerate(chosen)])
        records = [
            replace(
                samples[k].records[n],
                id=asked[n],
                partner=None if (partner := samples[k].records[n].partner) is None else partner - k * self.stride,
                candidate=k,
                score=rounded(float(scores[k, n])),
            )
            for n, k in enumerate(chosen)
        ]
        return Sample(images, samples[0].labels, tuple(records))

    def _scores(self, sample: Sample) -> Tensor:
        """The score [N] of each image: L(T), or L(S) - w L(T)."""
        of_teacher = self._losses(self.teacher, sample)
        return of_teacher if self.student is None else self._losses(self.student, sample) - self.own.weight * of_teacher

    def _losses(self, judge: Classifier, sample: Sample) -> Tensor:
        parts = zip(torch.split(sample.images, self.rows), torch.split(sample.labels, self.rows), strict=True)
        device = judge.device
        return torch.cat(
            [
                cross_entropy(judge.logits(images.to(device).float() / 255).float(), labels.to(device)).cpu()
                for images, labels in parts
            ]
        )


def pick(scores: Tensor, keep: str) -> Tensor:
    """Numbers int64 [N] of the kept candidates by their scores [K, N]; of equal ones the first."""
    if keep == "medium":
        order = scores.argsort(dim=0, stable=True)
        return order[(len(scores) - 1) // 2]
    return scores.argmax(0) if keep == "learnable" else scores.argmin(0)


def _part_of(told: Callable[[float], object], k: int, count: int) -> Callable[[float], object]:
    """What is told the share of call k of so many, and tells that of all."""
    return lambda share: told((k + share) / count)
