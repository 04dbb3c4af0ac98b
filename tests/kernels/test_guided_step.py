"""The guided step's kernel: no worse than PyTorch of the same precision, judged in float64."""

import pytest
import torch

from dfkd_kernels.guided_step import _operator, clean_estimate, combined, guided_step, guided_step_ref, paste
from tests.properties import given, settings, st

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TERMS = ("push", "before", "noise", "mix")


def inputs(shape=(3, 4, 8, 6), cfg_rows=2, dtype=torch.float32, seed=0):
    """Everything a step takes: model outputs of `dtype`, ids beyond 32 bits, a seed beyond 63."""
    g = torch.Generator().manual_seed(seed)
    images, _, height, width = shape
    z, push, before = (torch.randn(shape, generator=g).to(DEVICE) for _ in range(3))
    box = torch.tensor([[0, 1, height, max(1, width - 2)]] * images)
    return {
        "z": z,
        "model": torch.randn(cfg_rows, *shape, generator=g).to(DEVICE, dtype),
        "row": torch.rand(8, generator=g).to(DEVICE) * 2 + 0.25,
        "push": push,
        "before": before,
        "noise": (2**63 + 5, torch.arange(images, device=DEVICE) * 2**33 + 5, 7),
        "mix": (torch.randperm(images, generator=g).to(DEVICE), box.to(DEVICE)),
    }


def judge(t):
    """Error within that of eager PyTorch plus one rounding of the result."""
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in t.items()}
    for kernel, eager, exact in zip(guided_step(**t), guided_step_ref(**t), guided_step_ref(**doubled), strict=True):
        assert (kernel.shape, kernel.dtype) == (t["z"].shape, torch.float32)
        error, allowed = ((x.double() - exact).abs().max() for x in (kernel, eager))
        assert error <= allowed + torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cfg_rows", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 3, 5, 7), (2, 4, 64, 64)],  # minimal; odd and prime; Stable Diffusion's, of several tiles
    ids=str,
)
def test_no_worse_than_eager(shape, cfg_rows, dtype):
    judge(inputs(shape, cfg_rows, dtype))


@pytest.mark.parametrize("terms", [(), ("push",), ("before",), ("noise",), ("mix",), ("noise", "mix")], ids=str)
def test_terms_left_out(terms):
    judge({name: value for name, value in inputs().items() if name not in TERMS or name in terms})


@settings(deadline=None, max_examples=10)  # a busy machine is not a failure
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 2]),
    st.sets(st.sampled_from(TERMS)),
)
def test_any_shape(shape, cfg_rows, terms):
    judge({name: value for name, value in inputs(shape, cfg_rows).items() if name not in TERMS or name in terms})


def test_other_memory_formats():
    t = inputs((2, 4, 8, 8))
    other = t | {name: t[name].contiguous(memory_format=torch.channels_last) for name in ("z", "push", "before")}
    other["model"] = t["model"].repeat_interleave(2, 4)[..., ::2]
    for found, wanted in zip(guided_step(**other), guided_step(**t), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("step", [guided_step, guided_step_ref])
def test_mixing_is_pasting_afterwards(step):
    t = inputs()
    mix = t.pop("mix")
    for mixed, plain in zip(step(**t, mix=mix), step(**t), strict=True):
        assert torch.equal(mixed, paste(plain, *mix))
        assert not torch.equal(mixed, plain)


def test_clean_estimate_is_the_unguided_z0_and_differentiable():
    t = inputs()
    z, model, row = t["z"].requires_grad_(), t["model"], t["row"]
    clean = clean_estimate(z, model, row)
    torch.testing.assert_close(clean, guided_step_ref(z, model, row)[1])
    (slope,) = torch.autograd.grad(clean.sum(), z)
    torch.testing.assert_close(slope, row[0].expand_as(z))


def test_cfg_1_is_the_conditional_output_and_0_the_unconditional():
    t = inputs()
    for cfg in (0, 1):
        t["row"][7] = cfg
        torch.testing.assert_close(combined(t["model"], t["row"]), t["model"][cfg])


def test_operator():
    t = inputs()
    tensors = (t["z"], t["model"], t["row"], t["push"], t["before"], t["noise"][1], *t["mix"])
    torch.library.opcheck(_operator, (*tensors, -5, 3))
    torch.library.opcheck(_operator, (*tensors[:3], None, None, None, None, None, 0, 0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": torch.zeros(3, 4, 8, 6, dtype=torch.float64)}, "z: .*float64; want"),
        ({"z": torch.zeros(0, 4, 8, 6)}, "not empty"),
        ({"model": torch.zeros(3, 3, 4, 8, 6)}, r"model: \(3, 3, 4, 8, 6\)"),
        ({"row": torch.zeros(7)}, r"row: \(7,\)"),
        ({"push": torch.zeros(3, 4, 8, 6).half()}, "push: .*float16"),
        ({"mix": (torch.zeros(3), torch.zeros(3, 4).long())}, r"partner: \(3,\) .*float32 on .*want \(3,\) .*int64"),
        ({"row": torch.zeros(8, device="meta")}, "row: .* on meta; want .* on"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        guided_step(**inputs() | change)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 4, 64, 64), (7, 8, 9, 11)], ids=str)
def test_natively_at_run_size(shape):
    judge(inputs(shape, dtype=torch.float16))


@pytest.mark.gpu
def test_a_new_group_size_and_step_compile_nothing_anew():
    from dfkd_kernels.guided_step import _kernel

    def compiled():
        return sum(len(cache[0]) for cache in _kernel.device_caches.values())

    guided_step(**inputs((16, 4, 8, 8)))
    before = compiled()
    for images in (1, 3, 32):
        t = inputs((images, 4, 8, 8))
        guided_step(**t | {"noise": (images, t["noise"][1], images)})
    assert compiled() == before
