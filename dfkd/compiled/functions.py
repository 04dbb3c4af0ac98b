"""A part of a synthesis that a compiler can take over: tensors in, tensors out, on networks whose weights stay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_engine.spec import TensorSpec

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Function:
    """One function of tensors with all that naming, compiling, judging and timing an engine of it takes.

    name: an identifier, such as "unet". kind: "forward" or "gradient", which tolerance judges it.
    call: the function on eager networks; it may take torch.autograd.grad in a detached copy of an input.
    inputs, outputs: in the order of the call; None stands for the rows of a call, in front.
    rows: of a call as planned. largest: most that a call may have. one_shape: rows depend on one another, so that every
        call has `rows` of them.
    samples: (rows, seed) -> inputs such as a run has. exact: makes the call on float64 networks, when a judge needs it.
    components: digest of each network or file in it. config: every setting it follows from, in JSON's types; a loss
        enters as `dfkd.extension.described` gives it. sources: digest of the Python that it is written in.
    networks: those with group norms, which a compiler may be given in another form; the first is the one that is
        quantised. dtype: of the networks, "float32", "float16" or "bfloat16".
    eager: the call as a run without engines makes it, with kernels that no graph can hold; None: `call`.
    quantise: "none", or "int8" or "fp8" for products in 8 bits, whose ranges `calibrate` measures: it runs a copy of
        networks[0], which it is given, over inputs such as a run has.
    """

    name: str
    call: Call
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: str
    rows: int
    largest: int
    samples: Callable[[int, int], tuple[Tensor, ...]]
    exact: Callable[[], Call]
    components: Mapping[str, str]
    device: torch.device
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""
    networks: tuple[nn.Module, ...] = ()
    dtype: str = "float32"
    one_shape: bool = False
    eager: Call | None = None
    quantise: str = "none"
    calibrate: Callable[[nn.Module], object] | None = None

    def __str__(self) -> str:
        return self.name if self.quantise == "none" else f"{self.name} {self.quantise}"
