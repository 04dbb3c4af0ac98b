# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""One step of guided diffusion sampling in one launch: CFG, guidance push, sampler step, noise and Latent CutMix.

    m  = model[0], or u + cfg (c - u)                      classifier-free guidance, arXiv:2207.12598 (cfg: their w + 1)
    z0 = z0_z z + z0_model m + push                        the guided clean estimate
    z' = step_z z + step_model m + step_prev before + step_z0 push + step_noise n
    z', z0 [i, box i]  <-  z', z0 [partner i, box i]       Latent CutMix, arXiv:1905.04899 for latents

`before` is z0 of the step before (DPM-Solver++ 2M needs it), `push` what guidance adds to the clean estimate, and n the
Philox normal of (run seed, image id, stream), drawn in the kernel. A term whose tensor is None is left out. Every
linear sampler is a row of these coefficients, which stays on the device so that no step waits for the host.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dfkd_kernels.common import FLOATS, interpreted, require, require_triton, tl, triton
from dfkd_kernels.philox import philox_normal

COEFFICIENTS = ("z0_z", "z0_model", "step_z", "step_model", "step_prev", "step_noise", "step_z0", "cfg")
TILE, WARPS = 2048, 8  # eight values a thread: two 128-bit loads of float32, or one of a half

Noise = tuple[int, Tensor, int]  # run seed, ids int64 [G], stream
Mix = tuple[Tensor, Tensor]  # partner int64 [G], box int64 [G, 4]


def combined(model: Tensor, row: Tensor) -> Tensor:
    """The network's output under classifier-free guidance: model [K, G, C, h, w] -> [G, C, h, w] in the dtype of `row`.

    K = 1 is taken as it is; K = 2 holds the unconditional and the conditional output.
    """
    model = model.to(row.dtype)
    return model[0] if len(model) == 1 else model[0] + row[7] * (model[1] - model[0])


def clean_estimate(z: Tensor, model: Tensor, row: Tensor) -> Tensor:
    """The image that the network's output means, before guidance: z0_z z + z0_model m, [G, C, h, w]; differentiable."""
    return row[0] * z + row[1] * combined(model, row)


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """Which cells a box [G, 4] (y0, x0, y1, x1, ends exclusive) holds: bool [G, 1, height, width]."""
    y, x = torch.arange(height, device=box.device)[:, None], torch.arange(width, device=box.device)
    y0, x0, y1, x1 = box.T[:, :, None, None]
    held: Tensor = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    return held[:, None]


def paste(z: Tensor, partner: Tensor, box: Tensor) -> Tensor:
    """z [G, C, h, w] with every image's box [G, 4] (y0, x0, y1, x1) from its partner [G], both int64; a new tensor."""
    return torch.where(inside(box, *z.shape[2:]), z[partner], z)


def guided_step_ref(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    *,
    push: Tensor | None = None,
    before: Tensor | None = None,
    noise: Noise | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor]:
    """`guided_step` in PyTorch, which is also what runs on a CPU. Works in float64 where z and row are."""
    m = combined(model, row)
    z_next, z0 = row[2] * z + row[3] * m, row[0] * z + row[1] * m
    if before is not None:
        z_next = z_next + row[4] * before
    if push is not None:
        z_next, z0 = z_next + row[6] * push, z0 + push
    if noise is not None:
        seed, ids, stream = noise
        z_next = z_next + row[5] * philox_normal(seed, ids, stream, tuple(z.shape[1:]), z.dtype)
    return (z_next, z0) if mix is None else (paste(z_next, *mix), paste(z0, *mix))


if triton is not None:
    from dfkd_kernels.philox import normals_of_image

    # A group's size and a step's seed and stream compile nothing anew; n does, for wide accesses where 16 divides it.
    @triton.jit(do_not_specialize=["k0", "k1", "stream_id", "images", "pixels", "width"])
    def _kernel(
        next_ptr,  # [G, C, h, w] float32, as are z0, z, push and before
        z0_ptr,
        z_ptr,
        model_ptr,  # [CFG_ROWS, G, C, h, w], any floating dtype
        row_ptr,  # [8] float32
        push_ptr,  # or None
        before_ptr,  # or None
        ids_ptr,  # [G] int64, or None: no noise
        partner_ptr,  # [G] int64, or None: no CutMix
        box_ptr,  # [G, 4] int64, or None
        k0: tl.uint32,
        k1: tl.uint32,
        stream_id: tl.uint32,
        images,
        n,  # C h w
        pixels,  # h w
        width,
        CFG_ROWS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        image = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        f = tile * TILE + tl.arange(0, TILE)
        live = f < n
        source = image * n + f  # inside the box it is the partner's
        if partner_ptr is not None:
            partner = tl.load(partner_ptr + image)
            y, x = f % pixels // width, f % pixels % width
            inside = (y >= tl.load(box_ptr + 4 * image)) & (x >= tl.load(box_ptr + 4 * image + 1))
            inside &= (y < tl.load(box_ptr + 4 * image + 2)) & (x < tl.load(box_ptr + 4 * image + 3))
            source = tl.where(inside, partner, image) * n + f
        z = tl.load(z_ptr + source, mask=live, other=0.0)
        m = tl.load(model_ptr + source, mask=live, other=0.0).to(tl.float32)
        if CFG_ROWS == 2:
            c = tl.load(model_ptr + images.to(tl.int64) * n + source, mask=live, other=0.0).to(tl.float32)
            m += tl.load(row_ptr + 7) * (c - m)
        z_next = tl.load(row_ptr + 2) * z + tl.load(row_ptr + 3) * m
        z0 = tl.load(row_ptr) * z + tl.load(row_ptr + 1) * m
        if before_ptr is not None:
            z_next += tl.load(row_ptr + 4) * tl.load(before_ptr + source, mask=live, other=0.0)
        if push_ptr is not None:
            push = tl.load(push_ptr + source, mask=live, other=0.0)
            z_next += tl.load(row_ptr + 6) * push
            z0 += push
        if ids_ptr is not None:
            noise = normals_of_image(tl.load(ids_ptr + image), tile, k0, k1, stream_id, TILE)
            if partner_ptr is not None:
                pasted = normals_of_image(tl.load(ids_ptr + partner), tile, k0, k1, stream_id, TILE)
                noise = tl.where(inside, pasted, noise)
            z_next += tl.load(row_ptr + 5) * noise
        tl.store(next_ptr + image * n + f, z_next, mask=live)
        tl.store(z0_ptr + image * n + f, z0, mask=live)


def _launch(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    push: Tensor | None,
    before: Tensor | None,
    ids: Tensor | None,
    partner: Tensor | None,
    box: Tensor | None,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    z_next, z0 = torch.empty_like(z), torch.empty_like(z)
    images, channels, height, width = z.shape
    n, seed = channels * height * width, seed % 2**64
    # Triton launches on the current device, which may be another GPU; where z is on a CPU nothing changes.
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        _kernel[(images, -(-n // TILE))](
            z_next, z0, z, model, row, push, before, ids, partner, box, seed & 0xFFFFFFFF, seed >> 32, stream,
            images, n, height * width, width, CFG_ROWS=len(model), TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
    return z_next, z0


@torch.library.custom_op("dfkd::guided_step", mutates_args=())
def _operator(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    push: Tensor | None,
    before: Tensor | None,
    ids: Tensor | None,
    partner: Tensor | None,
    box: Tensor | None,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """z' and z0; every tensor contiguous, the seed as a signed integer of 64 bits."""
    if interpreted(z):
        return _launch(z, model, row, push, before, ids, partner, box, seed, stream)
    noise = None if ids is None else (seed % 2**64, ids, stream)
    mix = None if partner is None or box is None else (partner, box)
    return guided_step_ref(z, model, row, push=push, before=before, noise=noise, mix=mix)


_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(z: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z)


def guided_step(
    z: Tensor,
    model: Tensor,
    row: Tensor,
    *,
    push: Tensor | None = None,
    before: Tensor | None = None,
    noise: Noise | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor]:
    """One sampling step of a group of G images in one kernel launch (equations at the top of the file).

    Tensors of another memory format are copied to contiguous NCHW first: latents are small beside the networks.

    Args:
        z: latents [G, C, h, w], float32, not empty.
        model: the network's output [K, G, C, h, w], any floating dtype; K = 1, or 2 (unconditional, conditional).
        row: float32 [8], a value for each of COEFFICIENTS.
        push: like z, what guidance adds to the clean estimate.
        before: like z, the guided clean estimate of the step before.
        noise: run seed (0 <= seed < 2^64), ids int64 [G], stream (0 <= stream < 2^32).
        mix: Latent CutMix, partner int64 [G] (indices within the group) and box int64 [G, 4] (y0, x0, y1, x1).

    Returns:
        The next latents z' and the guided clean estimate z0, like z and new tensors.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: Triton is not installed.
    """
    require_triton()
    if z.dim() != 4 or z.dtype != torch.float32 or not z.numel():
        raise ValueError(f"z: {tuple(z.shape)} {z.dtype}; want [G, C, h, w] float32, not empty")
    cfg_rows = 2 if len(model) == 2 else 1
    seed, ids, stream = noise or (0, None, 0)
    partner, box = mix or (None, None)
    require("model", model, (cfg_rows, *z.shape), FLOATS, z)
    require("row", row, (len(COEFFICIENTS),), (torch.float32,), z)
    require("push", push, z.shape, (torch.float32,), z)
    require("before", before, z.shape, (torch.float32,), z)
    require("ids", ids, z.shape[:1], (torch.int64,), z)
    require("partner", partner, z.shape[:1], (torch.int64,), z)
    require("box", box, (len(z), 4), (torch.int64,), z)
    given = (None if t is None else t.contiguous() for t in (z, model, row, push, before, ids, partner, box))
    z_next, z0 = _operator(*given, seed - (seed >> 63 << 64), stream)
    return z_next, z0


GUIDED_STEPS: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {"torch": guided_step_ref, "triton": guided_step}
