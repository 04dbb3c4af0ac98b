"""A guided step beside its networks: two launches, and what they are on a CPU.

    UNet -> m  |  clean: m -> x       |  decoder, teacher -> g  |  update: g, m, z -> z', the UNet's next input
               |  guided_clean.py     |                         |  guided_update.py

A step without guidance is `update` alone. `push` (guided_push.py) is one more launch for every further guidance step at
one noise level; of a step through the UNet, which is called again after it, it is the first launch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dfkd_kernels.guided_clean import guided_clean, guided_clean_ref
from dfkd_kernels.guided_push import guided_push, guided_push_ref
from dfkd_kernels.guided_update import guided_update, guided_update_ref


@dataclass(frozen=True)
class GuidedStep:
    """The three functions, as one implementation has them."""

    clean: Callable[..., Any]
    push: Callable[..., Any]
    update: Callable[..., Any]


GUIDED_STEPS: Mapping[str, GuidedStep] = {
    "torch": GuidedStep(guided_clean_ref, guided_push_ref, guided_update_ref),
    "triton": GuidedStep(guided_clean, guided_push, guided_update),
}
