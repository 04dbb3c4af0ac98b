"""Sampling beside others: the published loop and diffusers give our images; FLOP are those of the calls made."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_sampling as bench
from benchmarks.bench_sampling import PEERS, PLAIN, SEED, TUNED, Networks, plain_diffusers
from benchmarks.flops import counted
from benchmarks.published_loop import PublishedLoop
from dfkd.synthesis import pack as packs
from dfkd_kernels.philox import philox_normal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> Networks:
    return bench.demo_networks(3, CPU)


@pytest.fixture(scope="module")
def thin() -> Networks:
    """Stable Diffusion 1.5's layers with few channels, which predict epsilon at leading timesteps."""
    return bench.sd15_networks(3, CPU, "fp32", 64, thin=True)


def stepped(networks: Networks, steps: int) -> Networks:
    return replace(networks, config=networks.config.replace(steps=steps))


def both(networks, dtype, images=2, **changes):
    """Images by the published loop, one after another, and by our sampler together, in this dtype."""
    networks = copy.deepcopy(networks)
    pipe = networks.pipeline("published", **PLAIN, **changes)
    for network in (*pipe.prior.networks.values(), pipe.teacher.module):
        network.to(dtype)
    pipe.prior.to("cpu")  # forgets what it encoded in single precision
    loop, pack = PublishedLoop.of(pipe), pipe.pack(torch.arange(images), SEED)
    loop.scheduler.alphas_cumprod = loop.scheduler.alphas_cumprod.to(dtype)
    noise, prompts, labels = pack.start(), pack.conditional[0], pack.labels.tolist()
    assert noise.dtype == prompts.dtype == dtype
    one = [slice(i, i + 1) for i in range(images)]
    theirs = torch.cat([loop(noise[i], labels[i.start], prompts[i], *pack.unconditional) for i in one])
    return theirs, pipe.prior.decode(pipe.latents(pack))


@pytest.mark.parametrize("bn_loss", ["relative", "norm"])
def test_the_published_loop_is_our_unet_path(demo, bn_loss, monkeypatch):
    """In float64, over all of the preset's steps: two programs of the same arithmetic, one of them in batches."""
    monkeypatch.setattr(packs, "philox_normal", lambda *key: philox_normal(*key).double())
    theirs, ours = both(demo, torch.float64, bn_loss=bn_loss)
    assert (theirs - ours).abs().max() < 1e-9
    assert theirs.std() > 0.05, "an empty image would equal any other"


def test_the_teacher_guides_the_published_loop(demo):
    """In every step; and in float32 rounding, which guidance of unit length amplifies, stays unseen."""
    theirs, ours = both(stepped(demo, 2), torch.float32)
    weaker, _ = both(stepped(demo, 2), torch.float32, guidance_step=0.01)
    assert (theirs - ours).abs().mean() < 1e-3 < 0.005 < (theirs - weaker).abs().mean()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"gradient": "latent"}, "gradient latent"), ({"bn_stats": "group"}, "bn_stats"), ({"cfg_to": 0.5}, "cfg_to"),
     ({"sampler": "dpmpp2m"}, "DDIM")],
)  # fmt: skip
def test_other_settings_are_refused(demo, changes, named):
    with pytest.raises(ValueError, match=named):
        PublishedLoop.of(demo.pipeline("published", **PLAIN, **changes))


def test_the_published_loop_has_networks_of_its_own(demo):
    """Its hooks and its order of weights are not those of the pipeline that it was made from."""
    pipe = demo.pipeline("published", **PLAIN)
    loop = PublishedLoop.of(pipe)
    assert not any(layer._forward_pre_hooks for layer in pipe.teacher.module.modules())
    assert loop.unet.conv_in.weight.is_contiguous() and not pipe.prior.denoiser.conv_in.weight.is_contiguous()


def unguided(networks):
    pipe = networks.pipeline("unguided", **PLAIN)
    with torch.no_grad():
        return pipe.prior.decode(pipe.latents(pipe.pack(torch.arange(3), SEED)))


@pytest.mark.parametrize("name", ["demo", "thin"])
def test_without_a_teacher_our_images_are_those_of_diffusers(request, name):
    """Prediction of v at trailing timesteps, and of epsilon in steps that do not divide 1000; only rounding differs."""
    networks = stepped(request.getfixturevalue(name), 7)
    ours, theirs = unguided(networks), plain_diffusers(networks, 3)()
    assert ours.std() > 0.05 and ((ours > 0) & (ours < 1)).float().mean() > 0.5  # or clamping would hide a difference
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_the_compiled_pipeline_is_the_same_on_copies(thin, monkeypatch):
    """Compiled as diffusers documents it, with inductor's settings in its calls alone."""
    asked, seen = [], []

    def compiled(network, **options):
        asked.append(options)
        return network

    def read():
        return {name: getattr(torch._inductor.config, name) for name in TUNED}

    monkeypatch.setattr(torch, "compile", compiled)
    networks, before = stepped(thin, 2), read()
    call = plain_diffusers(networks, 3, "max-autotune")
    unet = next(cell.cell_contents for cell in call.__closure__ if hasattr(cell.cell_contents, "unet")).unet
    unet.register_forward_pre_hook(lambda *_: seen.append(read()))
    torch.testing.assert_close(call(), unguided(networks), rtol=0, atol=2e-4)
    assert asked == 2 * [{"mode": "max-autotune", "fullgraph": True}] and seen[0] == TUNED != before == read()
    assert "Fused" in str(unet.attn_processors) and "Fused" not in str(networks.prior.denoiser.attn_processors)


@pytest.mark.parametrize("name", ["published", "late", "diffusers"])
def test_flop_are_those_of_the_calls_that_are_made(demo, name):
    """Within three thousandths: fused attention has the gradient of the text too, which nobody asks for."""
    networks = stepped(demo, 3)
    work = bench.made(name, networks, 3)
    work.call()  # texts are encoded
    found, look = counted(work.call)[1], 0
    if name == "late":
        look = counted(networks.teacher.logits, torch.rand(3, 3, 32, 32))[1]
    assert work.flop == pytest.approx(found - look, rel=3e-3)


def test_guided_rows_stand_beside_the_published_loop_and_the_others_beside_diffusers(demo, monkeypatch):
    def broken(call, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    found = bench.groups(stepped(demo, 3), 3)
    assert [group.baseline for group in found] == ["published", "diffusers"]
    works = {name: make() for group in found for name, make in group.rows.items() if name != PEERS[1]}
    assert works["published"].amount == bench.SINGLES and works["late"].facts["images at a time"] == 3
    with pytest.raises(RuntimeError, match="no compiler"):
        found[1].rows[PEERS[1]]()
    (few,) = bench.groups(demo, 3, names=["latent", "late"])
    assert list(few.rows) == ["latent", "late"]
