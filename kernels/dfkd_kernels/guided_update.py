"""Launch two of a guided step: the sampler's step with its guidance, its noise and Latent CutMix.

    m     = u + w (c - u)
    d     = push - rho g / rms(g)                                       kernels/guided_push.py
    z'    = step_z z + step_model m + step_prev z0_before + step_z0 d + step_noise n
    z0'   = z0_z z + z0_model m + d                                     the guided clean estimate
    z', z0' [i, box i]  <-  z', z0' [partner i, box i]                  Latent CutMix, arXiv:1905.04899
    rows  = z' as the UNet takes it, once or twice                      kernels/rows.py

Every first-order sampler, and DPM-Solver++ 2M by z0_before, is a row of these coefficients
(dfkd/synthesis/schedule.py). n is the Philox normal of (seed, id of the image, stream), made in the kernel. Terms whose
tensor is None are left out.
"""

import torch
from torch import Tensor

from dfkd_kernels.guided_clean import TILE, WARPS, check, combined, interpreted
from dfkd_kernels.guided_push import check_gradient, programs, stepped
from dfkd_kernels.philox import philox_normal
from dfkd_kernels.rows import NetworkInput, flat, network_rows, pixels_first, row_count

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only installation needs the reference alone
    triton = None


def paste(z: Tensor, partner: Tensor, box: Tensor) -> Tensor:
    """z [G, C, H, W] with every image's box [G, 4] (y0, x0, y1, x1) from its partner [G], both int64; a new tensor."""
    y, x = torch.arange(z.shape[2], device=z.device)[:, None], torch.arange(z.shape[3], device=z.device)
    y0, x0, y1, x1 = box.T[:, :, None, None]
    inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    return torch.where(inside[:, None], z[partner], z)


def guided_update_ref(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    micro: int,
    copies: int,
    *,
    gradient: Tensor | None = None,
    length: Tensor | None = None,
    norm: str = "rms",
    unit: float = 1.0,
    push: Tensor | None = None,
    before: Tensor | None = None,
    noise: tuple[int, Tensor, int] | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    network: NetworkInput | None = None,
    next_copies: int = 1,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `guided_update`, in PyTorch: also what runs on a CPU."""
    m = combined(model.to(z.dtype), row, len(z), micro, copies)
    if gradient is not None and length is not None:
        push = stepped(push, gradient, length, norm, unit, z)
    after = row[2] * z + row[3] * m
    if before is not None:
        after = after + row[4] * before
    if push is not None:
        after = after + row[6] * push
    if noise is not None:
        seed, ids, stream = noise
        after = after + row[5] * philox_normal(seed, ids, stream, tuple(z.shape[1:]), z.dtype)
    clean = None
    if keep:
        clean = row[0] * z + row[1] * m
        clean = clean if push is None else clean + push
    if mix is not None:
        after, clean = paste(after, *mix), None if clean is None else paste(clean, *mix)
    return after, None if network is None else network_rows(network.of(after), micro, next_copies), clean


if triton is not None:
    from dfkd_kernels.guided_clean import network_output, other_order
    from dfkd_kernels.guided_push import step_of_image
    from dfkd_kernels.philox import image_words, interleaved, normal_pair

    @triton.jit  # type: ignore[untyped-decorator]
    def noise_of_tile(  # type: ignore[no-untyped-def]
        image, tile, f, k0, k1, stream_id, pixels, CHANNELS: tl.constexpr, ORDER: tl.constexpr, TILE: tl.constexpr
    ):
        """Normals [TILE] of one image at the offsets f = tile TILE + 0, 1, ... of its memory order.

        Philox counts elements with the channel outermost, four a block. ORDER 0: so does memory. ORDER 1: channels are
        innermost, and four neighbouring pixels of a channel make a block. ORDER 2: neither, so every element works out
        its block for itself alone.
        """
        if ORDER == 0:
            block = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        elif ORDER == 1:
            place = tile * (TILE // 4) + tl.arange(0, TILE // 4)  # four pixels, one channel; channels innermost
            block = (place % CHANNELS * pixels + place // CHANNELS * 4) // 4
        else:
            element = f % CHANNELS * pixels + f // CHANNELS
            block = element // 4
        c0, c1, c2, c3 = image_words(block, image, k0, k1, stream_id)
        v0, v1 = normal_pair(c0, c1)
        v2, v3 = normal_pair(c2, c3)
        if ORDER == 0:
            n = tl.reshape(interleaved(v0, v1, v2, v3), [TILE])
        elif ORDER == 1:
            lanes = tl.reshape(interleaved(v0, v1, v2, v3), [TILE // (4 * CHANNELS), CHANNELS, 4])
            n = tl.reshape(tl.permute(lanes, [0, 2, 1]), [TILE])
        else:
            lane = element % 4
            n = tl.where(lane < 2, tl.where(lane == 0, v0, v1), tl.where(lane == 2, v2, v3))
        return n

    @triton.jit(do_not_specialize=["k0", "k1", "stream_id", "unit"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        after_ptr,  # [G, C, h, w]
        rows_ptr,  # [rows, C, h, w] of the UNet's dtype, or None
        clean_ptr,  # like after, or None
        z_ptr,  # like after
        model_ptr,  # [rows, C, h, w] of the UNet's dtype
        row_ptr,  # [8] float32
        gradient_ptr,  # [G, C, h, w], or None
        length_ptr,  # [G] float32, or None
        push_ptr,  # like after, or None
        before_ptr,  # like after, or None
        ids_ptr,  # [G] int64, or None
        partner_ptr,  # [G] int64, or None
        box_ptr,  # [G, 4] int64, or None
        unit: tl.float32,
        k0: tl.uint32,
        k1: tl.uint32,
        stream_id: tl.uint32,
        images,
        micro,
        n,
        pixels,
        width,
        CHANNELS: tl.constexpr,
        NHWC: tl.constexpr,  # of all that is like z, and of the walk
        MODEL_NHWC: tl.constexpr,
        GRADIENT_NHWC: tl.constexpr,
        ROWS_NHWC: tl.constexpr,
        NOISE_ORDER: tl.constexpr,
        COPIES: tl.constexpr,
        NEXT_COPIES: tl.constexpr,
        NORM: tl.constexpr,
        TILE: tl.constexpr,
    ):
        place = tl.program_id(0).to(tl.int64)
        image = tl.minimum(place, images - 1)  # places past the group fill up the last micro-batch
        kept = tl.where(place < images, n, 0)
        first = (place // micro) * (NEXT_COPIES * micro) + place % micro
        if partner_ptr is not None:
            partner = tl.load(partner_ptr + image)
            y0 = tl.load(box_ptr + 4 * image)
            x0 = tl.load(box_ptr + 4 * image + 1)
            y1 = tl.load(box_ptr + 4 * image + 2)
            x1 = tl.load(box_ptr + 4 * image + 3)
        if gradient_ptr is not None:
            length = tl.load(length_ptr + image)
            step = step_of_image(gradient_ptr, image, length, unit, n, NORM, TILE)
            if partner_ptr is not None:
                partner_length = tl.load(length_ptr + partner)
                partner_step = step_of_image(gradient_ptr, partner, partner_length, unit, n, NORM, TILE)
        for tile in range(tl.program_id(1), tl.cdiv(n, TILE), tl.num_programs(1)):
            f = tile * TILE + tl.arange(0, TILE)
            live = f < n
            source = image
            if partner_ptr is not None:
                pixel = f // CHANNELS if NHWC else f % pixels
                y, x = pixel // width, pixel % width
                inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
                source = tl.where(inside, partner, image)
            z = tl.load(z_ptr + source * n + f, mask=live, other=0.0).to(tl.float32)
            at = other_order(f, pixels, CHANNELS, NHWC, MODEL_NHWC)
            m = network_output(model_ptr, source, at, live, micro, n, tl.load(row_ptr + 7), COPIES)
            after = tl.load(row_ptr + 2) * z + tl.load(row_ptr + 3) * m
            clean = tl.load(row_ptr) * z + tl.load(row_ptr + 1) * m
            if before_ptr is not None:
                before = tl.load(before_ptr + source * n + f, mask=live, other=0.0).to(tl.float32)
                after += tl.load(row_ptr + 4) * before
            if push_ptr is not None:
                push = tl.load(push_ptr + source * n + f, mask=live, other=0.0).to(tl.float32)
                after += tl.load(row_ptr + 6) * push
                clean += push
            if gradient_ptr is not None:
                at = other_order(f, pixels, CHANNELS, NHWC, GRADIENT_NHWC)
                if partner_ptr is not None:
                    steps = tl.where(inside, partner_step, step)
                    guided = f < tl.where(inside, tl.where(partner_length != 0, n, 0), tl.where(length != 0, n, 0))
                else:
                    steps = step
                    guided = f < tl.where(length != 0, n, 0)
                g = tl.load(gradient_ptr + source * n + at, mask=guided, other=0.0).to(tl.float64)
                d = (steps * g).to(tl.float32)
                after -= tl.load(row_ptr + 6) * d
                clean -= d
            if ids_ptr is not None:
                own = noise_of_tile(
                    tl.load(ids_ptr + image), tile, f, k0, k1, stream_id, pixels, CHANNELS, NOISE_ORDER, TILE
                )
                if partner_ptr is not None:
                    other = noise_of_tile(
                        tl.load(ids_ptr + partner), tile, f, k0, k1, stream_id, pixels, CHANNELS, NOISE_ORDER, TILE
                    )
                    own = tl.where(inside, other, own)
                after += tl.load(row_ptr + 5) * own
            tl.store(after_ptr + image * n + f, after.to(after_ptr.dtype.element_ty), mask=f < kept)
            if clean_ptr is not None:
                tl.store(clean_ptr + image * n + f, clean.to(clean_ptr.dtype.element_ty), mask=f < kept)
            if rows_ptr is not None:
                at = other_order(f, pixels, CHANNELS, NHWC, ROWS_NHWC)
                value = after.to(rows_ptr.dtype.element_ty)
                for copy in tl.static_range(NEXT_COPIES):
                    tl.store(rows_ptr + (first + copy * micro) * n + at, value, mask=live)


def noise_order(channels: int, pixels: int, nhwc: bool) -> int:
    """ORDER of `noise_of_tile`."""
    if not nhwc:
        return 0
    return 1 if pixels % 4 == 0 and 4 * channels <= TILE and channels & (channels - 1) == 0 else 2


def _launch(
    after: Tensor,
    rows: Tensor | None,
    clean: Tensor | None,
    z: Tensor,
    model: Tensor,
    row: Tensor,
    gradient: Tensor | None,
    length: Tensor | None,
    push: Tensor | None,
    before: Tensor | None,
    ids: Tensor | None,
    partner: Tensor | None,
    box: Tensor | None,
    norm: str,
    unit: float,
    seed: int,
    stream: int,
    micro: int,
    copies: int,
) -> None:
    images, channels, height, width = z.shape
    n = channels * height * width
    places = images if rows is None else row_count(images, micro, 1)
    nhwc, rms = pixels_first(z), gradient is not None and norm == "rms"
    seed %= 2**64
    _kernel[programs(places, n, rms)](
        after, rows, clean, z, model, row, gradient, length, push, before, ids, partner, box,
        unit, seed & 0xFFFFFFFF, seed >> 32, stream, images, micro, n, height * width, width,
        CHANNELS=channels, NHWC=nhwc, MODEL_NHWC=pixels_first(model),
        GRADIENT_NHWC=gradient is not None and pixels_first(gradient),
        ROWS_NHWC=rows is not None and pixels_first(rows),
        NOISE_ORDER=noise_order(channels, height * width, nhwc), COPIES=copies,
        NEXT_COPIES=1 if rows is None else len(rows) // places, NORM=rms, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op("dfkd::guided_update", mutates_args=("after", "rows", "clean"))
def _operator(
    after: Tensor,
    rows: Tensor | None,
    clean: Tensor | None,
    z: Tensor,
    model: Tensor,
    row: Tensor,
    gradient: Tensor | None,
    length: Tensor | None,
    push: Tensor | None,
    before: Tensor | None,
    ids: Tensor | None,
    partner: Tensor | None,
    box: Tensor | None,
    norm: str,
    unit: float,
    seed: int,
    stream: int,
    micro: int,
    copies: int,
) -> None:
    """Writes after, and rows and clean where given; every tensor dense, the latents in the memory format of z."""
    if interpreted(z):
        return _launch(
            after, rows, clean, z, model, row, gradient, length, push, before, ids, partner, box,
            norm, unit, seed, stream, micro, copies,
        )  # fmt: skip
    found, _, kept = guided_update_ref(
        z, model, row, micro, copies,
        gradient=gradient, length=length, norm=norm, unit=unit, push=push, before=before, keep=clean is not None,
        noise=None if ids is None else (seed % 2**64, ids, stream),
        mix=None if partner is None or box is None else (partner, box),
    )  # fmt: skip
    after.copy_(found)
    if clean is not None and kept is not None:
        clean.copy_(kept)
    if rows is not None:
        rows.copy_(network_rows(found, micro, len(rows) // row_count(len(z), micro, 1)))


_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(*arguments: object) -> None:
    return None


def guided_update(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    micro: int,
    copies: int,
    *,
    gradient: Tensor | None = None,
    length: Tensor | None = None,
    norm: str = "rms",
    unit: float = 1.0,
    push: Tensor | None = None,
    before: Tensor | None = None,
    noise: tuple[int, Tensor, int] | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    network: NetworkInput | None = None,
    next_copies: int = 1,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One launch from the networks' outputs to the UNet's next input.

    Args:
        z, model, row, micro, copies: as for `guided_clean`.
        gradient: [G, C, h, w], floating; needs `length`. With norm "rms" it is divided by its root mean square per
            image, with "none" by `unit`.
        length: rho, float32 [G]; 0 leaves an image unguided.
        push: like z, of the guidance steps before.
        before: like z, the guided clean estimate of the step before.
        noise: the run's seed, ids int64 [G], the step's stream.
        mix: partner int64 [G] and box int64 [G, 4] of Latent CutMix.
        network: what the UNet takes; None: it is not called again. Of its scale and shift nothing is made.
        next_copies: 2 where it will be called with and without the prompt.
        keep: also give z0'.

    Returns:
        z' like z, rows [K next_copies m, C, h, w] or None, z0' like z or None. None of them is an input.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: Triton is not installed.
    """
    micro = min(micro, len(z))
    check(z, model, row, micro, copies)
    if (gradient is None) != (length is None):
        raise ValueError("gradient and length go together")
    if gradient is not None and length is not None:
        check_gradient(gradient, length, norm, z)
    for name, tensor in (("push", push), ("before", before)):
        if tensor is not None and (tensor.shape, tensor.dtype) != (z.shape, z.dtype):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; want {tuple(z.shape)} {z.dtype}")
    seed, ids, stream = noise or (0, None, 0)
    partner, box = mix or (None, None)
    for name, tensor, shape in (("ids", ids, (len(z),)), ("partner", partner, (len(z),)), ("box", box, (len(z), 4))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.int64):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; want {shape} int64")
    z, model = flat(z), flat(model)
    push, before = (None if t is None else flat(t, z) for t in (push, before))
    after, clean = torch.empty_like(z), torch.empty_like(z) if keep else None
    rows = None if network is None else network.empty(row_count(len(z), micro, next_copies), z)
    _operator(
        after, rows, clean, z, model, row, None if gradient is None else flat(gradient), length, push, before,
        ids, partner, None if box is None else box.contiguous(),
        norm, unit, seed - (seed >> 63 << 64), stream, micro, copies,
    )  # fmt: skip
    return after, rows, clean
