# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Counter-based random numbers: the same value for an image whatever batch, device or order it is drawn in.

Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), ten times

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0));  k0 += W0;  k1 += W1

with counter = (block of four elements, stream, id low, id high) and key = (seed low, seed high). Element e of an image
is lane e % 4 of block e // 4, elements counted in row-major order of `shape`.

    bits     x                                           integer in [0, 2^32)
    uniform  (x >> 9 + 1/2) 2^-23                        open interval (0, 1), exact in float32
    normal   sqrt(-2 ln u) (cos, sin)(2 pi v)            Box-Muller on lanes (0, 1) and (2, 3), u = (x + 1/2) 2^-32

The normal is worked out in float64 and rounded to float32 before the cast to `dtype`: float64 functions differ between
devices in the last bits only, so after rounding the CPU and the GPU draw the same image. Kernels that need noise draw
it themselves by `normals_of_image`.
"""

import math

import torch
from torch import Tensor

from dfkd_kernels.common import tl, triton

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox-4x32 on four int64 tensors of values in [0, 2^32); returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product may wrap past the sign bit; shift and mask still give its upper and lower words.
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
    return c0, c1, c2, c3


def _lanes(seed: int, ids: Tensor, stream: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The words of an image's blocks: four int64 tensors [B, blocks], one a lane.

    Raises:
        ValueError: an argument is outside the bounds that `philox_normal` names.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids: shape {tuple(ids.shape)} {ids.dtype}; want a vector of int64")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed}; want 0 <= seed < 2^64")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream: {stream}; want 0 <= stream < 2^32")
    if min(shape, default=0) < 0 or math.prod(shape) > 2**33:
        raise ValueError(f"shape: {tuple(shape)}; want sizes >= 0 and at most 2^33 elements an image")
    rows = (ids if ids.device.type == "cuda" else ids.cpu())[:, None]  # other devices may lack float64
    block = torch.arange(-(-math.prod(shape) // 4), device=rows.device)[None, :]
    counter = (block, torch.full_like(block, stream), rows & _MASK, (rows >> 32) & _MASK)
    return philox_4x32(counter, (seed & _MASK, seed >> 32))


def _interleaved(lanes: tuple[Tensor, ...], ids: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Four lanes [B, blocks] -> [B, *shape] on the device of `ids`."""
    values = torch.stack(lanes, dim=-1).flatten(1)[:, : math.prod(shape)]
    return values.to(ids.device, dtype).reshape(len(ids), *shape)


def philox_bits(seed: int, ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Raw random words: int64 [B, *shape] with values in [0, 2^32) on the device of `ids`.

    Args and errors as for `philox_normal`.
    """
    return _interleaved(_lanes(seed, ids, stream, shape), ids, shape, torch.int64)


def philox_uniform(
    seed: int, ids: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in the open interval (0, 1): [B, *shape] on the device of `ids`, float32 or float64.

    Drawn from the same words as the normals of the same stream, so independent draws need streams of their own.
    Half precision is refused: it would round values onto 0 and 1. Other args and errors as for `philox_normal`.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype}; want torch.float32 or torch.float64")
    lanes = tuple(((lane >> 9).double() + 0.5) * 2.0**-23 for lane in _lanes(seed, ids, stream, shape))
    return _interleaved(lanes, ids, shape, dtype)


def philox_normal(
    seed: int, ids: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers: [B, *shape] on the device of `ids`.

    Row i is a function of (seed, ids[i], stream, shape) alone.

    Args:
        seed: 0 <= seed < 2^64, the run's seed.
        ids: int64 [B], image ids.
        stream: 0 <= stream < 2^32, which of an image's independent sequences (its start, a step's noise, ...).
        shape: shape of one image's numbers, at most 2^33 elements.
        dtype: a floating dtype; the float32 value is rounded to it.

    Raises:
        ValueError: an argument is outside these bounds.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: {dtype}; want a floating dtype")
    u0, u1, u2, u3 = ((lane.double() + 0.5) * 2.0**-32 for lane in _lanes(seed, ids, stream, shape))
    r0, r2 = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    a1, a3 = 2 * math.pi * u1, 2 * math.pi * u3
    pairs = (r0 * torch.cos(a1), r0 * torch.sin(a1), r2 * torch.cos(a3), r2 * torch.sin(a3))
    return _interleaved(tuple(value.float() for value in pairs), ids, shape, dtype)


if triton is not None:

    @triton.jit
    def philox_words(c0, c1, c2, c3, k0, k1):
        """Ten rounds of Philox-4x32 on uint32 blocks of one shape: the device's `philox_4x32`."""
        for _ in tl.static_range(10):
            p0 = c0.to(tl.uint64) * 0xD2511F53
            p1 = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
            c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        return c0, c1, c2, c3

    @triton.jit
    def normal_pair(a, b):
        """Box-Muller on two uint32 words: two float32 normals, worked out in float64.

        The angle is reduced to within pi/4 of a quarter turn in integers, exactly, so that sine and cosine are two
        short polynomials (fdlibm's): the library's cover any angle, for which they keep a table on the stack.
        """
        radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        shifted = b + 0x20000000  # wraps: angles just below a whole turn are near quarter 0
        quarter = shifted >> 30
        rest = (shifted & 0x3FFFFFFF).to(tl.float64) - 536870911.5  # -2^29, and the half of v = (b + 1/2) 2^-32
        x = rest * 1.4629180792671596e-09  # 2 pi 2^-32
        q = x * x
        s = -2.50507602534068634195e-08 + q * 1.58969099521155010221e-10
        s = -1.98412698298579493134e-04 + q * (2.75573137070700676789e-06 + q * s)
        sine = x + x * q * (-1.66666666666666324348e-01 + q * (8.33333333332248946124e-03 + q * s))
        c = 2.08757232129817482790e-09 + q * -1.13596475577881948265e-11
        c = 2.48015872894767294178e-05 + q * (-2.75573143513906633035e-07 + q * c)
        c = 4.16666666666666019037e-02 + q * (-1.38888888888741095749e-03 + q * c)
        cosine = 1.0 - 0.5 * q + q * q * c
        odd = (quarter & 1) == 1
        along = tl.where(odd, -sine, cosine)
        across = tl.where(odd, cosine, sine)
        radius = tl.where(quarter >= 2, -radius, radius)
        return (radius * along).to(tl.float32), (radius * across).to(tl.float32)

    @triton.jit
    def normals_of_image(image, tile, k0, k1, stream_id, TILE: tl.constexpr):
        """Normals float32 [TILE] of the image with id `image`: elements tile TILE + 0, 1, ... in row-major order."""
        block = tile * (TILE // 4) + tl.arange(0, TILE // 4)  # four elements each
        c0 = block.to(tl.uint32)
        zero = c0 - c0  # carries the counter words and keys that are the same for all blocks
        c1 = zero + stream_id.to(tl.uint32)
        c2 = zero + (image & 0xFFFFFFFF).to(tl.uint32)
        c3 = zero + ((image >> 32) & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, zero + k0.to(tl.uint32), zero + k1.to(tl.uint32))
        v0, v1 = normal_pair(w0, w1)
        v2, v3 = normal_pair(w2, w3)
        return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [TILE])  # lane 0, 1, 2, 3 of every block in turn
