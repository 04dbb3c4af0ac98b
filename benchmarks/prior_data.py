"""The prior's own training data as a method: what a student learns from world Y itself, without diffusion or teacher.

dfkd-generate --method benchmarks/prior_data.py:PriorData ...
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.prior_world import CLASS_NAMES, SIZE, prior_images
from dfkd.config import GenerateConfig
from dfkd.errors import UsageError
from dfkd.runtime import derived_seed
from dfkd.synthesis.synthesizer import Sample, records_of
from dfkd.teachers import Classifier


class PriorData:
    """Images of world Y, labels in turn. Raises UsageError for a teacher of other classes or another size."""

    name, group, needs_prior = "prior_data", 1, False

    def __init__(self, prior: None, teacher: Classifier, config: GenerateConfig) -> None:
        if (teacher.class_names, teacher.input_size) != (CLASS_NAMES, SIZE):
            why = f"the prior's world has the classes {', '.join(CLASS_NAMES)} at {SIZE}x{SIZE}"
            raise UsageError("the prior's data does not fit this teacher", why, "use the demo's teacher")
        self.class_names, self.image_size = CLASS_NAMES, SIZE

    def identity(self) -> Mapping[str, Any]:
        return {}

    def __call__(self, ids: Sequence[int], labels: Sequence[int] | None = None, seed: int = 0) -> Sample:
        wanted = torch.tensor([i % len(CLASS_NAMES) for i in ids] if labels is None else list(labels))
        images = [prior_images(1, derived_seed(seed, "world", i), wanted[n : n + 1])[0] for n, i in enumerate(ids)]
        return Sample(torch.cat(images), wanted, records_of(ids, wanted, CLASS_NAMES, seed))
