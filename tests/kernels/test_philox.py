"""Philox: published vectors, distribution, independence of batch and order, the kernels' against the reference."""

import math

import pytest
import torch

from dfkd_kernels.guided_step import guided_step
from dfkd_kernels.philox import philox_4x32, philox_bits, philox_normal, philox_uniform

SEED = 0x0123456789ABCDEF
IDS = torch.tensor([0, 1, 7, 2**31, 2**32 + 7, 2**62 + 3])  # around the limits of both id words


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # kat_vectors of the Random123 distribution, lines "philox4x32 10"
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == expected


def test_counter_and_key_layout():
    """The third published vector again, through the public call: block 0, so only the first counter word is free."""
    seed, image, stream = (0x299F31D0 << 32) | 0xA4093822, (0x03707344 << 32) | 0x13198A2E, 0x85A308D3
    words = philox_4x32(tuple(torch.tensor([c]) for c in (0, stream, 0x13198A2E, 0x03707344)), (0xA4093822, 0x299F31D0))
    assert philox_bits(seed, torch.tensor([image]), stream, (4,))[0].tolist() == [w.item() for w in words]


def test_normal_moments():
    """Within five standard errors of N(0, 1): mean, variance, skewness, kurtosis, lag-1 correlation, tail."""
    x = philox_normal(SEED, torch.arange(64), 3, (4096,)).double().flatten()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(n)
    tail = 2 * (1 - 0.9772498680518208)
    assert abs((x.abs() > 2).double().mean() - tail) < 5 * math.sqrt(tail / n)


def test_uniform_is_flat_and_open():
    u = philox_uniform(SEED, torch.arange(64), 4, (4096,), torch.float64).flatten()
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)
    ends = ((torch.tensor([0, 2**32 - 1]) >> 9).float() + 0.5) * 2.0**-23  # the smallest and the largest value possible
    assert ends[0] > 0 and ends[1] < 1


def test_image_ignores_batch_and_order():
    whole = philox_normal(SEED, IDS, 2, (4, 5, 5))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(philox_normal(SEED, IDS[order], 2, (4, 5, 5)), whole[order])
    assert torch.equal(torch.cat([philox_normal(SEED, one, 2, (4, 5, 5)) for one in IDS.split(1)]), whole)


def test_seeds_ids_and_streams_differ():
    draws = [philox_bits(s, torch.tensor([i]), t, (8,)) for s in (0, 1, 2**32) for i in (0, 1, 2**32) for t in (0, 1)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 18


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 3), (0,)])
def test_shapes(shape):
    assert philox_normal(1, IDS, 0, shape).shape == (len(IDS), *shape)
    assert philox_normal(1, IDS[:0], 0, shape).shape == (0, *shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_casts_of_float32(dtype):
    assert torch.equal(philox_normal(1, IDS, 0, (33,), dtype), philox_normal(1, IDS, 0, (33,)).to(dtype))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "int32; want a vector of int64"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"shape \(2, 2\)"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "want 0 <= seed"),
        ({"stream": 2**32}, "stream: 4294967296"),
        ({"shape": (-1, 2)}, r"shape: \(-1, 2\)"),
        ({"dtype": torch.int64}, "floating dtype"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        philox_normal(**({"seed": 0, "ids": IDS, "stream": 0, "shape": (2,), "dtype": torch.float32} | change))


def test_uniform_refuses_half_precision():
    with pytest.raises(ValueError, match="float16; want"):
        philox_uniform(0, IDS, 0, (2,), torch.float16)


@pytest.mark.parametrize("n", [1, 7, 2051])  # one lane, an odd tail, two programs
def test_kernels_draw_the_same_normals(n, device):
    """All but a few equal, none further off than 2 ulp: both are float64 rounded once."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    z, row = torch.zeros(len(IDS), 1, 1, n, device=device), torch.zeros(8, device=device)
    row[5] = 1  # z' is the noise
    drawn, _ = guided_step(z, z[None], row, noise=(SEED, IDS.to(device), 0xFFFFFFFE))
    apart = drawn.cpu().view(torch.int32) - philox_normal(SEED, IDS, 0xFFFFFFFE, (1, 1, n)).view(torch.int32)
    assert apart.abs().max() <= 2 and apart.count_nonzero() <= 1e-4 * apart.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    shape = (4, 64, 64)
    assert torch.equal(philox_bits(SEED, IDS.cuda(), 5, shape).cpu(), philox_bits(SEED, IDS, 5, shape))
    assert torch.equal(philox_uniform(SEED, IDS.cuda(), 5, shape).cpu(), philox_uniform(SEED, IDS, 5, shape))
    got, want = philox_normal(SEED, IDS.cuda(), 5, shape, dtype).cpu(), philox_normal(SEED, IDS, 5, shape, dtype)
    # float64 functions of the two devices differ by about 1e-16, which crosses a float32 rounding once in 1e8 values
    assert (got != want).double().mean() < 1e-4
    assert torch.allclose(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
