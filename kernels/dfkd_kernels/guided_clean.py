"""Launch one of a guided step: the clean estimate that the network's output means, as the decoder takes it.

    m     = u + w (c - u)                    classifier-free guidance, arXiv:2207.12598 (our w is their w + 1)
    z0hat = z0_z z + z0_model m              the row of coefficients (dfkd/synthesis/schedule.py)
    x     = z0hat / s + shift                in the decoder's dtype and memory format

z, m and z0hat [G, C, h, w]; the network's output has its rows as kernels/rows.py lays them out, one copy an image (then
m is it) or two (u, then c). Computed in float32, or float64 where z is.
"""

import torch
from torch import Tensor

from dfkd_kernels.rows import NetworkInput, copies_of, flat, pixels_first, row_count

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None

# A step's coefficients, in this order: one vector [8] on the device, so that no step waits for the host.
COEFFICIENTS = ("z0_z", "z0_model", "step_z", "step_model", "step_prev", "step_noise", "step_z0", "cfg")
TILE, WARPS = 2048, 8  # eight values a thread: two 128-bit loads of float32, or one of a half


def combined(model: Tensor, row: Tensor, images: int, micro: int, copies: int) -> Tensor:
    """m [G, C, h, w] of the network's output."""
    if copies == 1:
        return copies_of(model, images, micro, 1)[0]
    free, prompted = copies_of(model, images, micro, 2)
    return free + row[7] * (prompted - free)


def guided_clean_ref(
    z: Tensor, model: Tensor, row: Tensor, micro: int, copies: int, decoder: NetworkInput, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As `guided_clean`, in PyTorch: also what runs on a CPU."""
    clean = row[0] * z + row[1] * combined(model.to(z.dtype), row, len(z), micro, copies)
    return decoder.of(clean), clean if keep else None


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def other_order(f, pixels, CHANNELS: tl.constexpr, FROM_NHWC: tl.constexpr, TO_NHWC: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where the element at offset f of an image in one memory order lies in the other."""
        if FROM_NHWC == TO_NHWC:
            return f
        elif TO_NHWC:
            return f % pixels * CHANNELS + f // pixels
        else:
            return f % CHANNELS * pixels + f // CHANNELS

    @triton.jit  # type: ignore[untyped-decorator]
    def network_output(model_ptr, image, at, live, micro, n, w, COPIES: tl.constexpr):  # type: ignore[no-untyped-def]
        """m of images `image` (one, or one of every element) at the offsets `at`, in float32."""
        first = (image // micro) * (COPIES * micro) + image % micro
        m = tl.load(model_ptr + first * n + at, mask=live, other=0.0).to(tl.float32)
        if COPIES == 2:
            c = tl.load(model_ptr + (first + micro) * n + at, mask=live, other=0.0).to(tl.float32)
            m = m + w * (c - m)
        return m

    @triton.jit(do_not_specialize=["scale", "shift"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        x_ptr,  # [G, C, h, w] of the decoder's dtype
        clean_ptr,  # like z, or None
        z_ptr,  # [G, C, h, w]
        model_ptr,  # [rows, C, h, w] of the UNet's dtype
        row_ptr,  # [8] float32
        scale: tl.float32,
        shift: tl.float32,
        micro,
        n,  # C h w; specialised, so that accesses are wide where it is a multiple of 16
        pixels,
        CHANNELS: tl.constexpr,
        NHWC: tl.constexpr,  # of z and of the walk
        MODEL_NHWC: tl.constexpr,
        X_NHWC: tl.constexpr,
        COPIES: tl.constexpr,
        TILE: tl.constexpr,
    ):
        image = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * TILE + tl.arange(0, TILE)
        live = f < n
        z = tl.load(z_ptr + image * n + f, mask=live, other=0.0).to(tl.float32)
        at = other_order(f, pixels, CHANNELS, NHWC, MODEL_NHWC)
        m = network_output(model_ptr, image, at, live, micro, n, tl.load(row_ptr + 7), COPIES)
        clean = tl.load(row_ptr) * z + tl.load(row_ptr + 1) * m
        if clean_ptr is not None:
            tl.store(clean_ptr + image * n + f, clean.to(clean_ptr.dtype.element_ty), mask=live)
        x = tl.div_rn(clean, tl.full([TILE], 0.0, tl.float32) + scale) + shift
        at = other_order(f, pixels, CHANNELS, NHWC, X_NHWC)
        tl.store(x_ptr + image * n + at, x.to(x_ptr.dtype.element_ty), mask=live)


def _launch(
    x: Tensor,
    clean: Tensor | None,
    z: Tensor,
    model: Tensor,
    row: Tensor,
    scale: float,
    shift: float,
    micro: int,
    copies: int,
) -> None:
    images, channels, height, width = z.shape
    n = channels * height * width
    _kernel[(images, -(-n // TILE))](
        x, clean, z, model, row, scale, shift, micro, n, height * width,
        CHANNELS=channels, NHWC=pixels_first(z), MODEL_NHWC=pixels_first(model), X_NHWC=pixels_first(x),
        COPIES=copies, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op("dfkd::guided_clean", mutates_args=("x", "clean"))
def _operator(
    x: Tensor,
    clean: Tensor | None,
    z: Tensor,
    model: Tensor,
    row: Tensor,
    scale: float,
    shift: float,
    micro: int,
    copies: int,
) -> None:
    """Writes x, and clean where it is given; every tensor dense, clean in the memory format of z."""
    if interpreted(x):
        return _launch(x, clean, z, model, row, scale, shift, micro, copies)
    found, kept = guided_clean_ref(z, model, row, micro, copies, NetworkInput(x.dtype, scale=scale, shift=shift), True)
    x.copy_(found)
    if clean is not None and kept is not None:
        clean.copy_(kept)


_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(*arguments: object) -> None:
    return None


def interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter runs kernels on this CPU tensor (TRITON_INTERPRET=1 when it was imported)."""
    return triton is not None and x.device.type == "cpu" and not isinstance(_kernel, triton.runtime.jit.JITFunction)


def check(z: Tensor, model: Tensor, row: Tensor, micro: int, copies: int) -> None:
    """Raise ValueError where these do not fit together, or RuntimeError where there is no Triton."""
    if triton is None:
        raise RuntimeError("Triton is not installed, and kernels=triton needs it. pip install triton")
    if z.dim() != 4 or z.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not z.numel():
        raise ValueError(f"z: {tuple(z.shape)} {z.dtype}; want [G, C, h, w], not empty, float32, float16 or bfloat16")
    if copies not in (1, 2) or micro < 1:
        raise ValueError(f"copies {copies}, micro {micro}; want 1 or 2 copies and micro >= 1")
    wanted = (row_count(len(z), min(micro, len(z)), copies), *z.shape[1:])
    if model.shape != wanted or not model.is_floating_point():
        raise ValueError(f"model: {tuple(model.shape)} {model.dtype}; want {wanted}, floating")
    if row.shape != (len(COEFFICIENTS),) or row.dtype != torch.float32:
        raise ValueError(f"row: {tuple(row.shape)} {row.dtype}; want ({len(COEFFICIENTS)},) float32")
    for name, tensor in (("model", model), ("row", row)):
        if tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device}, z on {z.device}")


def guided_clean(
    z: Tensor, model: Tensor, row: Tensor, micro: int, copies: int, decoder: NetworkInput, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """One launch from the UNet's output to the decoder's input.

    Args:
        z: latents [G, C, h, w], float32, float16 or bfloat16. Dense tensors in either memory format are read as they
            are, others are copied first; so with `model`.
        model: the UNet's output for all rows [K copies m, C, h, w], floating.
        row: float32 [8], COEFFICIENTS.
        micro: m, rows of a network call.
        copies: 2 where the UNet was called with and without the prompt, else 1.
        decoder: what the decoder takes.
        keep: also give z0hat itself.

    Returns:
        x [G, C, h, w] as `decoder` says, and z0hat like z or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: Triton is not installed.
    """
    micro = min(micro, len(z))
    check(z, model, row, micro, copies)
    z, model = flat(z), flat(model)
    x, clean = decoder.empty(len(z), z), torch.empty_like(z) if keep else None
    _operator(x, clean, z, model, row, decoder.scale, decoder.shift, micro, copies)
    return x, clean
