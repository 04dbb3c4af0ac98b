"""How far an engine is from the exact result, sample by sample.

    relative = ||got - want||_2 / ||want||_2        cosine = <got, want> / (||got|| ||want||)

`want` comes from a float64 copy of the networks, run by torch's own autograd where it is a gradient.

A gradient is not continuous where a ReLU is at 0 or two entries of a max-pooling window are equal. Within a rounding
error of such a kink any float32 program may land on either side, so eager float32 itself can miss float64 by 1e-3 and
more. A sample is taken to sit on one where eager float32 misses the tolerance at the sample or a rounding error beside
it; it is counted and not judged. This does not look at the engine, so an engine cannot excuse itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tolerance:
    """relative: largest allowed. cosine: smallest allowed of a gradient; None: not asked."""

    relative: float
    cosine: float | None = None


# float32: only the order of sums differs; eager itself is 3e-7 to 6e-7 off forward and 1e-6 for gradients.
# Half precision: one rounding is 2^-11 (float16) or 2^-8 (bfloat16). Eager itself is up to 1e-3 and 1e-2 off forward;
# in a gradient through a teacher a share of the ReLUs lies within a rounding of 0 in every sample, and eager is up to
# 0.15 (cosine 0.988) and 0.33 (0.948) off. The bounds let an engine be about as far off, and more where it is deeper.
# Eight bits, of a UNet's prediction: int8 has 255 even steps over the range of a whole layer, fp8 steps of 1/16 to 1/8
# of the value itself. Measured on the demo's prior, worst sample: 0.033 and 0.055; a calibration that went wrong
# (a third of the range, another network's) gives several times as much.
TOLERANCE = {
    ("forward", "float32"): Tolerance(1e-5),
    ("gradient", "float32"): Tolerance(1e-4, 0.9999),
    ("forward", "float16"): Tolerance(1e-2),
    ("gradient", "float16"): Tolerance(2e-1, 0.98),
    ("forward", "bfloat16"): Tolerance(8e-2),
    ("gradient", "bfloat16"): Tolerance(5e-1, 0.9),
    ("forward", "int8"): Tolerance(1e-1),
    ("forward", "fp8"): Tolerance(1.5e-1),
}

_NUDGES = 4  # points beside a sample at which eager is asked too


@dataclass(frozen=True)
class Parity:
    """relative, cosine: the worst of all judged samples and results. samples: judged. kinks: counted, not judged."""

    relative: float
    cosine: float
    samples: int
    kinks: int

    def problem(self, tolerance: Tolerance) -> str | None:
        """The bound of the tolerance that this measurement misses, as a phrase; None where it misses none."""
        if not self.relative <= tolerance.relative:  # not a number misses too
            return f"its relative error is {self.relative:.1e}, allowed is {tolerance.relative:.0e}"
        if tolerance.cosine is not None and not self.cosine >= tolerance.cosine:
            return f"its cosine is {self.cosine:.6f}, wanted is {tolerance.cosine} or more"
        return None

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure(
    engine: Function,
    reference64: Function,
    eager: Function,
    samples: Sequence[tuple[Tensor, ...]],
    kind: str,
    dtype: str = "float32",
) -> Parity:
    """The engine's errors over batches of samples.

    engine, eager: functions of a batch of arguments to results, every result with the batch in front.
    reference64: the same of float64 arguments (integers stay), in float64.
    samples: batches of arguments, such as one of the planned size and a remainder. A result of one number per sample is
        judged against the largest number of its batch: a cross-entropy near 0 has no digits of its own.
    kind, dtype: an entry of TOLERANCE; it decides what is a kink, and only gradients have any.

    Raises EngineError where more than half the samples sit on a kink, or there is none: then nothing was measured.
    """
    tolerance = TOLERANCE[kind, dtype]
    relative, cosine, judged, kinks = 0.0, 1.0, 0, 0
    for arguments in samples:
        want = reference64(*(x.double() if x.is_floating_point() else x for x in arguments))
        size = len(want[0])
        smooth = torch.ones(size, dtype=torch.bool)
        if kind == "gradient":
            for point in _nudged(arguments):
                for error in _errors(eager(*point), want):
                    smooth &= error.relative <= tolerance.relative
        for error in _errors(engine(*arguments), want):
            finite = error.relative.isfinite()
            if not finite.all():
                relative, cosine = math.inf, -1.0  # on a kink or not
            if (smooth & finite).any():
                relative = max(relative, error.relative[smooth & finite].max().item())
                cosine = min(cosine, error.cosine[smooth & finite].min().item())
        judged += int(smooth.sum())
        kinks += int((~smooth).sum())
    if kinks > judged or not judged:
        why = f"eager itself misses {tolerance.relative:.0e} at {kinks} of {kinks + judged} samples"
        raise EngineError("parity cannot be measured", why, "use smoother samples or a wider dtype")
    return Parity(relative, cosine, judged, kinks)


@dataclass(frozen=True)
class _Errors:
    """Errors of one result, sample by sample: relative and cosine, float64 [B] on the CPU."""

    relative: Tensor
    cosine: Tensor


def _errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> Iterator[_Errors]:
    for found, exact in zip(got, want, strict=True):
        if found.shape != exact.shape:
            why = f"it has shape {list(found.shape)}, the reference's is {list(exact.shape)}"
            raise EngineError("parity cannot be measured", why, "compare functions of one shape")
        a, b = (tensor.detach().double().cpu().reshape(len(tensor), -1) for tensor in (found, exact))
        norm = b.norm(dim=1)
        if exact.dim() == 1:
            yield _Errors(_ratio((a - b).norm(dim=1), norm.max()), torch.ones(len(a), dtype=torch.float64))
        else:
            product = a.norm(dim=1) * norm
            same = torch.where(product > 0, (a * b).sum(1) / product, (a.norm(dim=1) == norm).double())
            yield _Errors(_ratio((a - b).norm(dim=1), norm), same)


def _ratio(error: Tensor, norm: Tensor) -> Tensor:
    """error / norm, and 0 for an exact zero: 0 / 0 is no error."""
    return torch.where(error == 0, torch.zeros_like(error), error / norm)


def _nudged(arguments: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The arguments themselves, then with every floating entry moved by about two rounding errors of its dtype."""
    yield arguments
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NUDGES):
        yield tuple(_moved(x, generator) if x.is_floating_point() else x for x in arguments)


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + 2 * torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator).to(x))
