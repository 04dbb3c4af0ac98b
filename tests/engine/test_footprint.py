"""Bytes that are counted, against functions whose bytes are known and against the allocators of CPU and GPU."""

import gc

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dfkd_engine.footprint
from dfkd.cli.generate_options import EMBEDDED_PRIOR
from dfkd.cli.prepare import prepare
from dfkd.synthesis.planning.calls import network_calls
from dfkd.synthesis.planning.plan import footprints_of
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.run import Synthesis
from dfkd.synthesis.sampler import SamplerSettings
from dfkd.synthesis.schedule import build_table
from dfkd.teachers import Classifier, build, checkpoint
from dfkd_engine.footprint import footprint, weight_bytes
from dfkd_engine.networks import Prior
from dfkd_engine.planner import ELEMENT_LIMIT, Footprint
from tests.compiled.small_engines import options_of
from tests.sd15_sizes import SD15, SD15_VAE
from tests.synthesis.small_networks import SCHEDULER

KIB = 1024


def relu_chain(rows: int) -> torch.Tensor:
    """Two tensors of 1 KiB a row live at once, however long the chain."""
    x = torch.zeros(rows, 256)
    for _ in range(5):
        x = torch.relu(x)
    return x


def saved_chain(rows: int) -> torch.Tensor:
    """Autograd keeps every one of five results of 1 KiB a row; the backward pass holds two gradients more."""
    leaf = torch.zeros(rows, 256, requires_grad=True)
    x = leaf
    for _ in range(5):
        x = torch.sigmoid(x)
    (gradient,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
    return gradient


def with_a_constant(rows: int) -> torch.Tensor:
    table = torch.zeros(1024)
    return torch.zeros(rows, 256) + table[:256]


@pytest.mark.parametrize("without_data", [True, False])
@pytest.mark.parametrize(
    "call, fixed, row", [(relu_chain, 0, 2 * KIB), (saved_chain, 0, 9 * KIB), (with_a_constant, 4 * KIB, 2 * KIB)]
)
def test_bytes_that_are_known(call, fixed, row, without_data):
    found = footprint(call, without_data)
    assert (found.fixed, found.row, found.flop) == (fixed, row, 0)
    assert found.elements == (512 if call is with_a_constant else 256)  # the table is larger than two rows


def test_flop_of_a_row():
    assert footprint(lambda rows: torch.ones(rows, 8) @ torch.ones(8, 4), True).flop == 2 * 8 * 4


@pytest.mark.parametrize("without_data", [True, False])
def test_weights_and_their_views_are_not_a_call(without_data):
    layer = nn.Linear(300, 7)  # its weight is transposed in the call, a view of more elements than a row has
    with torch.no_grad():
        found = footprint(lambda rows: layer(torch.zeros(rows, 300)), without_data)
    assert (found.fixed, found.row, found.elements) == (0, 4 * 307, 300)


def test_a_function_that_asks_for_values_is_run_as_it_is():
    def call(rows):
        x = torch.zeros(rows, 256)
        return x + 1 if float(x.sum()) == 0 else None

    found = footprint(call, without_data=True)
    assert KIB * 2 <= found.row <= KIB * 2 + 8 and found.elements == 256


def test_a_function_that_fails_says_so():
    def call(rows):
        raise LookupError("of its own")

    with pytest.raises(LookupError, match="of its own"):
        footprint(call, without_data=True)


def test_weights_count_once():
    layer = nn.Linear(10, 10)
    assert weight_bytes(layer, layer) == 4 * 110
    assert weight_bytes(layer, nn.BatchNorm2d(3)) == 4 * 110 + 4 * 4 * 3 + 8


def watched_modes(patch) -> list:
    """The modes that calls are counted in from here on; None: with data."""
    modes, counted = [], dfkd_engine.footprint._counted
    patch.setattr(dfkd_engine.footprint, "_counted", lambda call, fake: (modes.append(fake), counted(call, fake))[1])
    return modes


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    module = build("resnet8_half", 10).eval()
    checkpoint.save(folder, Classifier(module, "resnet8_half", tuple("abcdefghij"), 32, (0.5,) * 3, (0.25,) * 3))

    def of(*more):
        return prepare(options_of(EMBEDDED_PRIOR, folder, "--group", 64, "--refine-steps", 1, *more))

    return of


def peak_of_the_allocator(call, rows) -> int:
    """Most bytes that torch's CPU allocator had given out during a call, over those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call(rows)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("name", ["unet", "decode", "gradient", "pixel_gradient", "gradient through the UNet"])
def test_against_the_allocator_of_the_cpu(demo, name):
    """The demo's networks with 48 rows: at least what was counted from one row and two, and little more.

    More by the scratch memory of single kernels, which is no tensor: a tenth here.
    """
    path = ("--gradient", "unet") if "UNet" in name else ()
    call = network_calls(demo(*path))[name.partition(" ")[0]]
    call(1)
    counted, real = footprint(call, without_data=False).bytes(48), peak_of_the_allocator(call, 48)
    assert 0.99 * counted <= real <= 1.15 * counted


@pytest.mark.parametrize("more", [("--cfg", "1"), ("--cfg", "1", "--gradient", "unet"), ("--cfg", "3")], ids=" ".join)
def test_it_is_the_same_without_data(demo, more, monkeypatch):
    calls = network_calls(demo(*more))
    for name in ("unet", "gradient"):
        real = footprint(calls[name], without_data=False)
        with monkeypatch.context() as patch:
            modes = watched_modes(patch)
            assert footprint(calls[name], without_data=True) == real
        assert None not in modes  # it was not run as it is


def test_a_group_in_parts_needs_no_more_than_its_rows_say(demo):
    """The plan takes a part's bytes from a whole group's call."""
    synthesis = demo()
    whole, parts = network_calls(synthesis)["gradient"], network_calls(synthesis, parts=2)["gradient"]
    one, other = footprint(whole, without_data=False), footprint(parts, without_data=False)
    assert other.row <= 1.01 * one.row  # the other part's latents and gradient are there too


def test_the_plan_is_the_same_at_every_start(demo):
    assert footprints_of(demo()) == footprints_of(demo())
    assert all(isinstance(found, Footprint) and found.row > 0 for found in footprints_of(demo()).values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["unet", "decode", "gradient", "pixel_gradient"])
def test_against_the_allocator_of_a_gpu(demo, name):
    """cuDNN's and cuBLAS's workspaces come on top, some tens of MiB: rows enough that they are a small part."""
    call = network_calls(demo("--device", "cuda"))[name]
    counted = footprint(call, without_data=False).bytes(512)
    call(512)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(512)
    real = torch.cuda.max_memory_allocated() - before
    assert 0.95 * counted <= real <= 1.3 * counted + 64 * KIB**2


def empty(make, dtype=torch.bfloat16) -> nn.Module:
    """A network on storages that nothing has written to: they take no memory until something reads them."""
    with torch.device("meta"):
        network = make().to(dtype)
    return network.to_empty(device="cpu").eval().requires_grad_(False)


@pytest.mark.slow
def test_stable_diffusion_at_512(monkeypatch):
    """The published arithmetic of half precision, counted: the decoder keeps 2.85 GiB an image for its gradient."""
    unet, vae = empty(lambda: UNet2DConditionModel(**SD15)), empty(lambda: AutoencoderKL(**SD15_VAE))
    module = empty(lambda: build("resnet34_imagenet", 10), torch.float32)
    teacher = Classifier(module, "resnet34_imagenet", tuple("abcdefghij"), 224, (0.5,) * 3, (0.25,) * 3)
    words = {"": torch.zeros(77, 768, dtype=torch.bfloat16)}
    prior = Prior(unet, vae, None, None, SCHEDULER, "epsilon", 4, (64, 64), 8, 0.18215, "", "", words)
    synthesis = Synthesis(
        prior, teacher, Guidance(prior.decode, teacher, LossWeights(0.1, 1.0)), build_table(SCHEDULER, "ddim", 10),
        SamplerSettings(), 0, (0,), 64, "", "", (64, 64), torch.device("cpu"),
    )  # fmt: skip
    modes = watched_modes(monkeypatch)
    found = footprints_of(synthesis)
    assert len(modes) == 3 and None not in modes
    rows = {name: ELEMENT_LIMIT // needs.elements for name, needs in found.items()}
    assert rows == {"unet": 102, "decode": 31, "gradient": 31}  # two rows of the UNet are one image
    assert found["gradient"].row / 2**30 == pytest.approx(2.85, rel=0.02)  # beside the decoder's, a teacher's 1 %
    assert found["decode"].row < found["gradient"].row / 3
