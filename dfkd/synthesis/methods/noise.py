"""Uniform noise with labels in turn: what any other method has to exceed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dfkd.config import GenerateConfig
from dfkd.config.fields import convert
from dfkd.extension import settings_of
from dfkd.synthesis.prompts import chosen_classes, labels_of
from dfkd.synthesis.synthesizer import Sample, label_probability, own_size, records_of
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from dfkd_kernels.philox import philox_uniform

PIXELS, GREY = 0, 1  # Philox streams


class Noise:
    """Pixels uniform in 0..1: independent in each channel, or the same in all, in a share `grey` of the images."""

    name = "noise"
    takes_clients = True
    group = 1
    needs_prior = False
    reads = ("size", "only")

    def __init__(self, prior: Prior | None, teacher: Classifier, config: GenerateConfig, grey: float = 0.5) -> None:
        with settings_of(f"method {config.method!r}"):
            if not 0 <= convert(grey, float) <= 1:
                raise ValueError(f"grey is {grey}: it must be at least 0 and at most 1")
        self.teacher, self.grey, self.call_size = teacher.tried(), grey, config.batching.batch
        self.class_names, self.image_size = teacher.class_names, own_size(config, teacher)
        self.classes = chosen_classes(teacher.class_names, config.sampling.only)

    def identity(self) -> Mapping[str, Any]:
        """Only `grey`, size, classes and the teacher, which states its probabilities in the records."""
        settings = {"grey": self.grey, "size": self.image_size, "classes": list(self.classes)}
        return {**settings, "teacher_digest": self.teacher.digest()}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        numbers = torch.as_tensor(list(ids), dtype=torch.int64)
        colour = philox_uniform(seed, numbers, PIXELS, (3, self.image_size, self.image_size))
        grey = philox_uniform(seed, numbers, GREY, (1, 1, 1)) < self.grey
        images = (torch.where(grey, colour[:, :1], colour) * 255).round().to(torch.uint8)
        found = labels_of(numbers, self.classes) if labels is None else torch.as_tensor(list(labels))
        sure = label_probability(self.teacher, images, found, self.call_size)
        return Sample(images, found, records_of(ids, found, self.class_names, seed, sure))
