# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Distillation's loss and its gradient in the student's logits, made in one launch.

    p = softmax(t / T), q = softmax(s / T)
    loss     = T^2 KL(p || q)                         per row; arXiv:1503.02531, section 2.1
    gradient = T (q - p)                              in s; the teacher gets none

s, t [B, C] and the gradient like s. Computed in float32, or float64 where one of s and t is. With `agreeing` a row
counts only where s and t are largest at the same class: then -loss at T = 1 is the adversarial loss of guidance.

q - p of two sure answers, or of two that nearly agree, is a small difference of large numbers. With d = log p - log q,
worked out from logits less their row's largest, and e = exp(-d) - 1 from its series where |d| < 1:

    q - p = p e,    KL(p || q) = sum p (d + e)        since p and q sum to the same; no term is negative

A logit of -inf is a class that its network rules out: p = 0 adds nothing, q = 0 < p gives an infinite loss and a finite
gradient, and a row of nothing else gives NaN, as softmax does.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_kernels.common import FLOATS, accumulated, interpreted, power_of_two, require, require_triton, tl, triton

TILE, WARPS = 2048, 8  # eight values a thread of each network's logits, all of which stay in registers
WIDEST = 4096  # classes of the widest row that fits; wider ones are read twice, so many classes at a time


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """p log(p / q) [B, C], differentiable; float32 at least."""
    s, t = (logits if logits.element_size() >= 4 else logits.float() for logits in (student, teacher))
    q, p = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    return F.kl_div(q, p, reduction="none", log_target=True).masked_fill(p == -torch.inf, 0)  # 0 log 0 is 0


def soft_kl_ref(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    agreeing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses [B] and gradient [B, C] of `soft_kl` by their definitions; both float32, or float64."""
    wide = accumulated(student, teacher)
    s, t = student.to(wide), teacher.to(wide)
    losses = temperature**2 * divergence(s, t, temperature).sum(1)
    gradient = temperature * ((s / temperature).softmax(1) - (t / temperature).softmax(1))
    if agreeing:
        agree = s.argmax(1) == t.argmax(1)
        losses, gradient = torch.where(agree, losses, 0), torch.where(agree[:, None], gradient, 0)
    return losses, gradient


if triton is not None:

    @triton.jit
    def log1p(x):
        """log(1 + x) for x > -1; in float32 the sum would round a small x away, and a whole row shares its error."""
        if x.dtype == tl.float64:
            return tl.log(1.0 + x)
        w = x / (2.0 + x)  # log(1 + x) = 2 artanh(w)
        q = w * w
        series = 2.0 * w * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9)))))
        return tl.where(tl.abs(w) < 0.18, series, tl.log(1.0 + x))

    @triton.jit
    def top_and_rest(x, place_of, SHARPNESS: tl.constexpr):
        """The largest value of rows [R, C], where it first is, and the sum of exp((x - largest) SHARPNESS) elsewhere.

        Kept apart from the 1 that the largest adds: of a sure answer it is all that is left.
        """
        top, place = tl.max(x, 1, return_indices=True, return_indices_tie_break_left=True)
        others = tl.where(place_of == place[:, None], 0.0, tl.exp((x - top[:, None]) * SHARPNESS))
        return top, place, tl.where(top == float("-inf"), 0.0, tl.sum(others, 1))

    @triton.jit
    def joined(top, rest, other_top, other_rest, SHARPNESS: tl.constexpr):
        """Two parts of a row: the rest of the whole, under the larger of both tops."""
        low = tl.where(top == other_top, 1.0, tl.exp(-tl.abs(top - other_top) * SHARPNESS))
        return tl.where(other_top > top, other_rest + (1.0 + rest) * low, rest + (1.0 + other_rest) * low)

    @triton.jit
    def differences(s, t, s_top, t_top, s_rest, t_rest, SHARPNESS: tl.constexpr):
        """Terms of KL(p || q), and q - p, of rows [R, C] or of parts of them."""
        a = (s - s_top[:, None]) * SHARPNESS
        b = (t - t_top[:, None]) * SHARPNESS
        q = tl.exp(a) * (1.0 / (1.0 + s_rest))[:, None]
        p = tl.exp(b) * (1.0 / (1.0 + t_rest))[:, None]
        # the two logarithms of sums differ by that of a quotient near 1 where the answers are alike
        d = (b - a) - log1p((t_rest - s_rest) / (1.0 + s_rest))[:, None]
        NEAR: tl.constexpr = 0.1 if s.dtype == tl.float64 else 1.0  # up to it these terms of the series do
        series = 1.0 / 5040 - d * (1.0 / 40320 - d * (1.0 / 362880 - d * (1.0 / 3628800)))
        series = 1.0 / 24 - d * (1.0 / 120 - d * (1.0 / 720 - d * series))
        series = d * d * (1.0 / 2 - d * (1.0 / 6 - d * series))  # d + exp(-d) - 1
        near = tl.abs(d) < NEAR
        difference = tl.where(near, p * (series - d), q - p)
        return tl.where(near, p * series, tl.where(p > 0.0, p * d, 0.0) + difference), difference

    @triton.jit
    def logits_of(ptr, row, column, live, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
        """Rows [R, C] of logits; past their end -inf, a class that is ruled out."""
        return tl.load(ptr + row[:, None] * STRIDE + column, mask=live, other=float("-inf")).to(DTYPE)

    @triton.jit
    def _kernel(
        losses_ptr,  # [B] float32 or float64
        gradient_ptr,  # [B, C], contiguous
        student_ptr,  # [B, C], columns side by side
        teacher_ptr,  # [B, C], likewise
        rows,
        CLASSES: tl.constexpr,  # with the strides: how far accesses are aligned follows from them
        STUDENT_STRIDE: tl.constexpr,
        TEACHER_STRIDE: tl.constexpr,
        TEMPERATURE: tl.constexpr,
        AGREEING: tl.constexpr,
        UNIT: tl.constexpr,  # what the gradient is multiplied with
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
        SHARPNESS: tl.constexpr = 1.0 / TEMPERATURE
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < rows
        column = tl.arange(0, BLOCK)[None, :]
        live = there[:, None] & (column < CLASSES)
        s = logits_of(student_ptr, row, column, live, STUDENT_STRIDE, DTYPE)
        t = logits_of(teacher_ptr, row, column, live, TEACHER_STRIDE, DTYPE)
        s_top, s_place, s_rest = top_and_rest(s, column, SHARPNESS)
        t_top, t_place, t_rest = top_and_rest(t, column, SHARPNESS)
        # online softmax, arXiv:1805.02867: of a wide row what is known grows by a block at a time
        for start in range(BLOCK, CLASSES, BLOCK):
            live = there[:, None] & (start + column < CLASSES)
            x = logits_of(student_ptr, row, start + column, live, STUDENT_STRIDE, DTYPE)
            top, place, rest = top_and_rest(x, column, SHARPNESS)
            s_rest = joined(s_top, s_rest, top, rest, SHARPNESS)
            s_place, s_top = tl.where(top > s_top, start + place, s_place), tl.maximum(s_top, top)
            x = logits_of(teacher_ptr, row, start + column, live, TEACHER_STRIDE, DTYPE)
            top, place, rest = top_and_rest(x, column, SHARPNESS)
            t_rest = joined(t_top, t_rest, top, rest, SHARPNESS)
            t_place, t_top = tl.where(top > t_top, start + place, t_place), tl.maximum(t_top, top)
        counted = there
        if AGREEING:
            counted = s_place == t_place
        kl = tl.zeros([ROWS], DTYPE)
        for start in range(0, CLASSES, BLOCK):
            live = there[:, None] & (start + column < CLASSES)
            if CLASSES > BLOCK:
                s = logits_of(student_ptr, row, start + column, live, STUDENT_STRIDE, DTYPE)
                t = logits_of(teacher_ptr, row, start + column, live, TEACHER_STRIDE, DTYPE)
            term, difference = differences(s, t, s_top, t_top, s_rest, t_rest, SHARPNESS)
            kl += tl.sum(term, 1)
            gradient = TEMPERATURE * difference
            if AGREEING:
                gradient = tl.where(counted[:, None], gradient, 0.0)
            at = gradient_ptr + row[:, None] * CLASSES + start + column
            tl.store(at, (UNIT * gradient).to(gradient_ptr.dtype.element_ty), mask=live)
        loss = TEMPERATURE * TEMPERATURE * kl
        if AGREEING:
            loss = tl.where(counted, loss, 0.0)
        tl.store(losses_ptr + row, loss, mask=there)


def tile_of(classes: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps. Narrower than the classes: their rows are read twice."""
    block = min(power_of_two(classes), WIDEST)
    return max(1, TILE // block), block, WARPS * max(1, block // TILE)


def unit_of(dtype: torch.dtype, temperature: float) -> float:
    """What a stored gradient is multiplied with, a power of two.

    In float16 it takes the largest gradient, T, just below the largest number: what is small then has room below.
    """
    return 2.0 ** math.floor(math.log2(2**15 / temperature)) if dtype == torch.float16 else 1.0


def _launch(student: Tensor, teacher: Tensor, temperature: float, agreeing: bool) -> tuple[Tensor, Tensor]:
    batch, classes = student.shape
    losses, gradient = _fake(student, teacher)
    if not batch:
        return losses, gradient
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    rows, block, warps = tile_of(classes)
    with torch.cuda.device_of(student):  # type: ignore[no-untyped-call]
        _kernel[(-(-batch // rows),)](
            losses, gradient, student, teacher, batch,
            CLASSES=classes, STUDENT_STRIDE=student.stride(0), TEACHER_STRIDE=teacher.stride(0),
            TEMPERATURE=temperature, AGREEING=agreeing, UNIT=unit_of(student.dtype, temperature),
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses, gradient


@torch.library.custom_op("dfkd::soft_kl", mutates_args=())
def _operator(student: Tensor, teacher: Tensor, temperature: float, agreeing: bool) -> tuple[Tensor, Tensor]:
    """Losses [B], and the gradient like the student's logits times `unit_of`."""
    if interpreted(student):
        return _launch(student, teacher, temperature, agreeing)
    losses, gradient = soft_kl_ref(student, teacher, temperature, agreeing)
    return losses, (gradient * unit_of(student.dtype, temperature)).to(student.dtype)


_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _fake(student: Tensor, teacher: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    losses = student.new_empty(student.shape[0], dtype=accumulated(student, teacher))
    return losses, torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, _, temperature, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.unit = unit_of(student.dtype, temperature)


def _backward(ctx: Any, of_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    # `out` makes it one pass in float32 whatever is stored, and autograd refuse a second derivative, which is not there
    factor = (of_losses / ctx.unit)[:, None]
    return torch.mul(gradient, factor, out=torch.empty_like(gradient)), None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, agreeing: bool = False) -> Tensor:
    """Losses [B] of logits [B, C], float32 or float64, differentiable once in the student's.

    A row of up to WIDEST classes is read once and its gradient written once; wider ones are read twice, the second time
    from the cache where it holds the rows in flight. The gradient is kept, and read and written again by the backward
    pass, which multiplies it with that of the losses.

    Args:
        student: float64, float32, float16 or bfloat16. Rows may have any stride; other strides are copied first.
        teacher: likewise, of any of these dtypes.
        temperature: T > 0.
        agreeing: rows whose largest logits are of different classes (the first, of several) have loss and gradient 0.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
        RuntimeError: Triton is not installed.
    """
    require_triton()
    if student.dim() != 2 or not student.shape[1] or student.dtype not in FLOATS:
        raise ValueError(f"student: {tuple(student.shape)} {student.dtype}; want [B, C >= 1], floating")
    require("teacher", teacher, student.shape, FLOATS, student)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}; want > 0, finite")
    losses: Tensor = _operator(student, teacher.detach(), temperature, agreeing)[0]
    return losses
