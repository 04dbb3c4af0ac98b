"""The launches of a guided step: no worse than eager PyTorch of the same precision, judged in float64."""

from dataclasses import dataclass

import pytest
import torch

from dfkd_kernels.guided_clean import guided_clean, guided_clean_ref
from dfkd_kernels.guided_push import guided_push, guided_push_ref, scaled
from dfkd_kernels.guided_step import GUIDED_STEPS
from dfkd_kernels.guided_update import guided_update, guided_update_ref
from dfkd_kernels.rows import NetworkInput, copies_of, network_rows, row_count

triton = pytest.importorskip("triton", reason="the kernels need Triton")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Inputs:
    """All that the launches take, for G images cut into micro-batches of `micro`."""

    shape: tuple[int, ...] = (3, 4, 8, 8)
    micro: int = 2
    copies: int = 2
    dtype: torch.dtype = torch.float32  # of the latents
    half: torch.dtype = torch.float32  # of what the networks give
    order: torch.memory_format = NCHW  # of what the networks give; latents of odd groups are in the other one
    norm: str = "rms"
    size: float = 1.0  # of the gradient
    seed: int = 0

    def tensors(self):
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape, dtype=self.dtype, order=self.order):
            return torch.randn(shape, generator=g).to(DEVICE, dtype).to(memory_format=order)

        images, other = self.shape[0], NHWC if self.shape[0] % 2 else NCHW
        rows = row_count(images, min(self.micro, images), self.copies)
        return {
            "z": normal(*self.shape, order=other),
            "model": normal(rows, *self.shape[1:], dtype=self.half),
            "row": torch.rand(8, generator=g).to(DEVICE) * 2 + 0.25,
            "gradient": normal(*self.shape, dtype=torch.float32).mul(self.size).to(self.half),
            "length": torch.arange(images).float().to(DEVICE) / 4,  # the first image is not guided
            "push": normal(*self.shape, order=other),
            "before": normal(*self.shape, order=other),
            "partner": torch.randperm(images, generator=g).to(DEVICE),
            "box": torch.tensor([[0, 1, self.shape[2], max(1, self.shape[3] - 2)]] * images, device=DEVICE),
        }


def no_worse(found, eager, truth):
    """Within what eager errs by, and one rounding of the result."""
    for kernel, reference, exact in zip(found, eager, truth, strict=True):
        assert kernel.shape == reference.shape and kernel.dtype == reference.dtype
        scale = exact.abs().max()
        error, allowed = ((x.double() - exact).abs().max() for x in (kernel, reference))
        assert error <= allowed + torch.finfo(kernel.dtype).eps * scale, (error, allowed, scale)


def doubled(tensors):
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def run_clean(clean, t, i, dtype):
    network = NetworkInput(dtype, i.order, 0.18215, 0.25)
    return clean(t["z"], t["model"], t["row"], min(i.micro, i.shape[0]), i.copies, network, True)


def run_push(push, t, i, dtype):
    network = NetworkInput(dtype, i.order, 0.18215, 0.25)
    micro = min(i.micro, i.shape[0])
    return push(t["push"], t["gradient"], t["length"], i.norm, 3.0, t["before"], network, micro, i.copies)


def run_update(update, t, i, dtype, terms=("push", "before", "noise", "mix", "gradient")):
    ids = torch.arange(i.shape[0], device=DEVICE) * 2**33 + 5
    every = {"noise": (2**63 + 5, ids, 7), "mix": (t["partner"], t["box"]), "push": t["push"], "before": t["before"]}
    chosen = {name: value for name, value in every.items() if name in terms}
    if "gradient" in terms:
        chosen |= {"gradient": t["gradient"], "length": t["length"], "norm": i.norm, "unit": 3.0}
    network, micro = NetworkInput(dtype, i.order), min(i.micro, i.shape[0])
    return update(
        t["z"], t["model"], t["row"], micro, i.copies, network=network, next_copies=i.copies, keep=True, **chosen
    )  # fmt: skip


LAUNCHES = {
    "clean": (run_clean, guided_clean, guided_clean_ref),
    "push": (run_push, guided_push, guided_push_ref),
    "update": (run_update, guided_update, guided_update_ref),
}


def judge(launch, i, **options):
    run, kernel, reference = LAUNCHES[launch]
    t = i.tensors()
    truth = run(reference, doubled(t), i, torch.float64, **options)
    no_worse(run(kernel, t, i, i.half, **options), run(reference, t, i, i.half, **options), truth)


SHAPES = [
    Inputs((1, 1, 1, 1), micro=1),  # minimal
    Inputs((2, 3, 5, 7), norm="none"),  # odd and prime
    Inputs((3, 3, 5, 7), order=NHWC, copies=1),  # channels innermost, no power of two: a block an element
    Inputs((3, 4, 8, 6), order=NHWC),  # blocks of four pixels
    Inputs((5, 4, 8, 6), order=NCHW),  # latents and networks in different orders
    Inputs((2, 4, 64, 64), micro=2),  # real: 512x512
    Inputs((1, 4, 64, 64), micro=1, order=NHWC),
]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("i", SHAPES, ids=lambda i: "x".join(map(str, i.shape)))
def test_no_worse_than_eager(launch, i):
    judge(launch, i)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(
    "dtype, half",
    [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.float16),
     (torch.bfloat16, torch.bfloat16)],
)  # fmt: skip
def test_precisions(launch, dtype, half):
    judge(launch, Inputs(dtype=dtype, half=half, norm="none" if dtype == half else "rms"))


@pytest.mark.parametrize("terms", [(), ("noise",), ("before",), ("mix",), ("gradient", "mix"), ("noise", "mix")])
def test_terms(terms):
    judge("update", Inputs(), terms=terms)


@pytest.mark.parametrize("size", [1e-25, 1e-37, 0.0])
def test_the_norm_of_a_sure_teachers_gradient(size):
    """Squares of such values underflow float32; a gradient of zeros stays zero."""
    t = Inputs(size=size).tensors()
    push, _ = guided_push(None, t["gradient"], t["length"], "rms", 1.0, t["before"], NetworkInput(), 3, 1)
    wanted = -t["length"][:, None, None, None] * scaled(t["gradient"].double(), "rms")
    torch.testing.assert_close(push.double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_image_of_length_0_is_left_alone():
    """Whatever its gradient is."""
    t = Inputs().tensors()
    t["gradient"][0] = torch.nan
    push, _ = guided_push(t["push"], t["gradient"], t["length"], "rms", 1.0, None, NetworkInput(), 3, 1)
    assert torch.equal(push[0], t["push"][0]) and push.isfinite().all()


def test_strided_inputs():
    i = Inputs((2, 4, 8, 8))
    t = i.tensors()
    wide = {name: t[name].repeat_interleave(2, 3)[..., ::2] for name in ("z", "model", "gradient", "push", "before")}
    assert not wide["z"].is_contiguous()
    for run, kernel, _ in LAUNCHES.values():
        for a, b in zip(run(kernel, t | wide, i, i.half), run(kernel, t, i, i.half), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("images, micro, copies", [(1, 1, 2), (5, 2, 2), (5, 2, 1), (6, 3, 2), (3, 3, 1), (3, 3, 2)])
def test_rows_and_back(images, micro, copies):
    z = torch.arange(images * 4.0).view(images, 1, 2, 2)
    rows = network_rows(z, micro, copies)
    assert len(rows) == row_count(images, micro, copies)
    assert all(torch.equal(copy, z) for copy in copies_of(rows, images, micro, copies))


@pytest.mark.parametrize("order", [NCHW, NHWC])
def test_operators(order):
    from dfkd_kernels import guided_clean, guided_push, guided_update

    t = Inputs(order=order).tensors()
    t = {k: v.contiguous(memory_format=NCHW) if v.dim() == 4 else v for k, v in t.items()}
    z, new = t["z"], torch.empty_like
    opcheck = torch.library.opcheck
    opcheck(guided_clean._operator, (new(z), new(z), z, t["model"], t["row"], 0.5, 0.1, 2, 2))
    args = (new(z), new(t["model"]), t["push"], t["gradient"], t["length"], t["before"], "rms", 2.0, 0.5, 0.1, 2)
    opcheck(guided_push._operator, args)
    ids = torch.arange(3, device=DEVICE)
    state = (new(z), new(t["model"]), new(z), z, t["model"], t["row"], t["gradient"], t["length"], t["push"])
    args = (*state, t["before"], ids, t["partner"], t["box"], "rms", 2.0, -5, 3, 2, 2)
    opcheck(guided_update._operator, args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": torch.zeros(3, 4, 8, 8, dtype=torch.float64)}, "float64; want"),
        ({"z": torch.zeros(0, 4, 8, 8)}, "not empty"),
        ({"model": torch.zeros(7, 4, 8, 8)}, r"model: \(7, 4, 8, 8\)"),
        ({"row": torch.zeros(7)}, r"row: \(7,\)"),
        ({"gradient": torch.zeros(3, 4, 8, 7)}, r"gradient: \(3, 4, 8, 7\)"),
        ({"length": torch.zeros(2)}, r"length: \(2,\)"),
        ({"push": torch.zeros(3, 4, 8, 8).half()}, "push: .*float16"),
        ({"partner": torch.zeros(3)}, r"partner: \(3,\) torch.float32; want \(3,\) int64"),
    ],
)
def test_refusals(change, message):
    t = Inputs().tensors() | {name: value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        run_update(guided_update, t, Inputs(), torch.float32)


def test_both_implementations_are_there():
    assert set(GUIDED_STEPS) == {"torch", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("i", [Inputs((64, 4, 64, 64), 32, half=torch.float16, order=NHWC), Inputs((7, 8, 8, 8), 7)])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_natively_at_run_size(launch, i):
    judge(launch, i)
