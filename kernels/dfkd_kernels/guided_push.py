"""A guidance step on its own: where a noise level has several, or where the UNet is called after it.

    push' = push - rho g / rms(g)            rms over an image; or push - rho g, as it is
    x     = (base + push') / s + shift       what the next network takes

rho [G] is an image's own step length; 0 leaves the image alone, whatever its gradient. On the `latent` path `base` is
z0hat and x goes to the decoder; on the `unet` path push is z itself, there is no base, and x are the doubled rows of
the UNet. g is the gradient that a network gave divided by `unit`: loss scale times s where it was taken in the
decoder's input.
"""

import torch
from torch import Tensor

from dfkd_kernels.guided_clean import TILE, WARPS, interpreted
from dfkd_kernels.rows import NetworkInput, flat, network_rows, pixels_first, row_count

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

PROGRAMS = 2048  # about four times what fills the largest GPU; more would only read the gradient more often


def scaled(gradient: Tensor, norm: str) -> Tensor:
    """The gradient as guidance uses it: of unit root mean square per image, or as it is. A zero gradient stays zero."""
    if norm == "none":
        return gradient
    # By the largest value first: squares of a sure teacher's gradients, 1e-25 and below, would underflow.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    unit = gradient / largest
    rms = unit.square().mean((1, 2, 3), keepdim=True).sqrt()
    return unit / rms.clamp_min(torch.finfo(gradient.dtype).tiny)


def stepped(push: Tensor | None, gradient: Tensor, length: Tensor, norm: str, unit: float, like: Tensor) -> Tensor:
    """push - rho scaled(g), in the dtype of `like`; push None stands for zeros."""
    g = gradient.to(like.dtype)
    g = scaled(g if unit == 1 else g / unit, norm)
    rho = length.to(like.dtype)[:, None, None, None]
    step = rho * torch.where(rho == 0, 0, g)
    return -step if push is None else push - step


def guided_push_ref(
    push: Tensor | None,
    gradient: Tensor,
    length: Tensor,
    norm: str,
    unit: float,
    base: Tensor | None,
    network: NetworkInput,
    micro: int,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """As `guided_push`, in PyTorch: also what runs on a CPU."""
    like = push if push is not None else base
    assert like is not None
    push = stepped(push, gradient, length, norm, unit, like)
    point = push if base is None else base + push
    return push, network_rows(network.of(point), micro, copies)


if triton is not None:
    from dfkd_kernels.guided_clean import other_order

    @triton.jit  # type: ignore[untyped-decorator]
    def step_of_image(gradient_ptr, image, length, unit, n, NORM: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        """What an image's gradient is multiplied with, a float64 scalar: rho / rms, or rho / unit.

        Squares are summed in float64, whose range holds those of the smallest float32: one pass does.
        """
        if NORM:
            sum_of_squares = tl.zeros([TILE], tl.float64)
            for start in range(0, n, TILE):
                f = start + tl.arange(0, TILE)
                g = tl.load(gradient_ptr + image * n + f, mask=f < n, other=0.0).to(tl.float64)
                sum_of_squares += g * g
            rms = tl.sqrt(tl.sum(sum_of_squares, 0) / n)
            # an image that is not guided may have any gradient, infinite ones too
            step = tl.where(length == 0.0, 0.0, length.to(tl.float64) / tl.where(rms == 0.0, 1.0, rms))
        else:
            step = length.to(tl.float64) / unit
        return step

    @triton.jit(do_not_specialize=["unit", "scale", "shift"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        pushed_ptr,  # [G, C, h, w]
        x_ptr,  # [rows, C, h, w] of the network's dtype
        push_ptr,  # like pushed, or None
        gradient_ptr,  # [G, C, h, w]
        length_ptr,  # [G] float32
        base_ptr,  # like pushed, or None
        unit: tl.float32,
        scale: tl.float32,
        shift: tl.float32,
        images,
        micro,
        n,
        pixels,
        CHANNELS: tl.constexpr,
        NHWC: tl.constexpr,
        GRADIENT_NHWC: tl.constexpr,
        X_NHWC: tl.constexpr,
        COPIES: tl.constexpr,
        NORM: tl.constexpr,
        TILE: tl.constexpr,
    ):
        place = tl.program_id(0).to(tl.int64)
        image = tl.minimum(place, images - 1)  # places past the group fill up the last micro-batch
        length = tl.load(length_ptr + image)
        step = step_of_image(gradient_ptr, image, length, unit, n, NORM, TILE)
        # bounds and not truth values: the interpreter cannot spread a truth value over a block
        kept = tl.where(place < images, n, 0)
        guided = tl.where(length != 0, n, 0)
        first = (place // micro) * (COPIES * micro) + place % micro
        for tile in range(tl.program_id(1), tl.cdiv(n, TILE), tl.num_programs(1)):
            f = tile * TILE + tl.arange(0, TILE)
            live = f < n
            at = other_order(f, pixels, CHANNELS, NHWC, GRADIENT_NHWC)
            g = tl.load(gradient_ptr + image * n + at, mask=f < guided, other=0.0)
            value = -(step * g.to(tl.float64)).to(tl.float32)
            if push_ptr is not None:
                value += tl.load(push_ptr + image * n + f, mask=live, other=0.0).to(tl.float32)
            tl.store(pushed_ptr + image * n + f, value.to(pushed_ptr.dtype.element_ty), mask=f < kept)
            if base_ptr is not None:
                value += tl.load(base_ptr + image * n + f, mask=live, other=0.0).to(tl.float32)
            x = tl.div_rn(value, tl.full([TILE], 0.0, tl.float32) + scale) + shift
            at = other_order(f, pixels, CHANNELS, NHWC, X_NHWC)
            for copy in tl.static_range(COPIES):
                tl.store(x_ptr + (first + copy * micro) * n + at, x.to(x_ptr.dtype.element_ty), mask=live)


def programs(images: int, n: int, norm: bool) -> tuple[int, int]:
    """The grid: images, and programs an image. With a norm each of them reads the whole gradient, from the cache."""
    tiles = -(-n // TILE)
    return images, min(tiles, max(1, -(-PROGRAMS // images))) if norm else tiles


def _launch(
    pushed: Tensor,
    x: Tensor,
    push: Tensor | None,
    gradient: Tensor,
    length: Tensor,
    base: Tensor | None,
    norm: str,
    unit: float,
    scale: float,
    shift: float,
    micro: int,
) -> None:
    images, channels, height, width = pushed.shape
    n = channels * height * width
    places = row_count(images, micro, 1)
    _kernel[programs(places, n, norm == "rms")](
        pushed, x, push, gradient, length, base, unit, scale, shift, images, micro, n, height * width,
        CHANNELS=channels, NHWC=pixels_first(pushed), GRADIENT_NHWC=pixels_first(gradient), X_NHWC=pixels_first(x),
        COPIES=len(x) // places, NORM=norm == "rms", TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op("dfkd::guided_push", mutates_args=("pushed", "x"))
def _operator(
    pushed: Tensor,
    x: Tensor,
    push: Tensor | None,
    gradient: Tensor,
    length: Tensor,
    base: Tensor | None,
    norm: str,
    unit: float,
    scale: float,
    shift: float,
    micro: int,
) -> None:
    """Writes pushed and x; every tensor dense, push and base in the memory format of pushed."""
    if interpreted(x):
        return _launch(pushed, x, push, gradient, length, base, norm, unit, scale, shift, micro)
    point = stepped(push, gradient, length, norm, unit, pushed)
    pushed.copy_(point)
    point = point if base is None else base + point
    copies = len(x) // row_count(len(point), micro, 1)
    x.copy_(network_rows(NetworkInput(x.dtype, scale=scale, shift=shift).of(point), micro, copies))


_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(*arguments: object) -> None:
    return None


def check_gradient(gradient: Tensor, length: Tensor, norm: str, like: Tensor) -> None:
    """Raise ValueError where these do not fit latents `like`, or RuntimeError where there is no Triton."""
    if triton is None:
        raise RuntimeError("Triton is not installed, and kernels=triton needs it. pip install triton")
    if gradient.shape != like.shape or gradient.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"gradient: {tuple(gradient.shape)} {gradient.dtype}; want {tuple(like.shape)}, floating")
    if length.shape != (len(like),) or length.dtype != torch.float32:
        raise ValueError(f"length: {tuple(length.shape)} {length.dtype}; want ({len(like)},) float32")
    if norm not in ("rms", "none"):
        raise ValueError(f"norm: {norm!r}; want 'rms' or 'none'")


def guided_push(
    push: Tensor | None,
    gradient: Tensor,
    length: Tensor,
    norm: str,
    unit: float,
    base: Tensor | None,
    network: NetworkInput,
    micro: int,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """One launch of a guidance step.

    Args:
        push: [G, C, h, w], float32, float16 or bfloat16; None: zeros like `base`.
        gradient: [G, C, h, w], floating, in either memory format.
        length: rho, float32 [G].
        norm: "rms" or "none".
        unit: what the gradient is to be divided by.
        base: like push, or None: zeros.
        network: what the network that comes next takes.
        micro, copies: how its rows lie (kernels/rows.py).

    Returns:
        push' like push, and the network's rows [K copies m, C, h, w].

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: Triton is not installed.
    """
    like = push if push is not None else base
    if like is None:
        raise ValueError("push and base are both None")
    check_gradient(gradient, length, norm, like)
    like, micro = flat(like), min(micro, len(like))
    push, base = (None if t is None else flat(t, like) for t in (push, base))
    pushed, x = torch.empty_like(like), network.empty(row_count(len(like), micro, copies), like)
    _operator(pushed, x, push, flat(gradient), length, base, norm, unit, network.scale, network.shift, micro)
    return pushed, x
