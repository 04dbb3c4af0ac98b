"""The sampler's loop over fused launches: equal to the loop written out, in both implementations, without a wait."""

import os
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd.synthesis import cutmix
from dfkd.synthesis.guidance import Guidance, LossWeights
from dfkd.synthesis.microbatch import in_microbatches
from dfkd.synthesis.sampler import Denoiser, SamplerSettings, sample_group, scaled
from dfkd.synthesis.schedule import build_table
from dfkd_kernels import guided_clean, guided_push, guided_update
from dfkd_kernels.philox import philox_normal
from dfkd_kernels.rows import NetworkInput
from tests.synthesis.small_networks import CHANNELS, SCHEDULER, SIDE, SmallPrior, classifier

SEED, STEPS = 11, 4
IDS, LABELS = torch.arange(70, 77), torch.tensor([0, 1, 2, 0, 1, 2, 0])
PROMPTS = [f"a {label}" for label in LABELS.tolist()]


class FusedPrior(SmallPrior):
    """With inputs of its own, as a Stable Diffusion prior has them."""

    scaling_factor = 0.5
    unet_input = NetworkInput(torch.float32, torch.channels_last)
    decoder_input = NetworkInput(torch.float32, torch.channels_last, scaling_factor, 0.1)

    def denoise(self, z, t, context):
        shift = torch.tanh(self.text(context.mean(1)) + t / 1000)
        return self.unet(z) + shift[:, :, None, None]

    def decode(self, z0):
        return self.decode_input(z0 / self.scaling_factor + 0.1)

    def decode_input(self, x):
        return super().decode(x)


def arguments(settings, kind, stats="group"):
    prior = FusedPrior()
    guidance = Guidance(prior.decode, classifier(), LossWeights(0.3, 0.7, bn_stats=stats))
    words, nothing = prior.encode_prompts(PROMPTS), prior.encode_prompts([""])
    table = build_table(SCHEDULER, kind, STEPS)
    return prior, guidance, table, settings, SEED, IDS, LABELS, words, nothing, (SIDE, SIDE)


def written_out(prior, guidance, table, settings, seed, ids, labels, words, nothing, size, micro):
    """The loop, a tensor operation at a time."""
    shape, denoise = (CHANNELS, *size), Denoiser(prior, words, nothing, settings.cfg, micro)
    z = table.init_scale * philox_normal(seed, ids, 0, shape)
    before = torch.zeros_like(z)
    for i in range(len(table)):
        row, cfg, t = table.row(i), settings.classifier_free(i, len(table)), torch.tensor(table.row(i).timestep)
        push, guided = torch.zeros_like(z), settings.guided(i, len(table))

        def clean(z, rows, row=row, cfg=cfg, t=t):
            return row.z0_z * z + row.z0_model * denoise.rows(z, rows, t, cfg)

        for _ in range(settings.guidance_repeats * (guided and settings.gradient == "unet")):
            gradient, _ = guidance.gradient(z, labels, micro, clean)
            z = z - settings.guidance_step * scaled(gradient, settings.guidance_norm)
        model = denoise(z, t, cfg)
        z0 = row.z0_z * z + row.z0_model * model
        for _ in range(settings.guidance_repeats * (guided and settings.gradient == "latent")):
            gradient, _ = guidance.gradient(z0 + push, labels, micro)
            push = push - settings.guidance_step * scaled(gradient, settings.guidance_norm)
        z = row.step_z * z + row.step_model * model + row.step_prev * before + row.step_z0 * push
        if row.step_noise:
            z = z + row.step_noise * philox_normal(seed, ids, 1 + i, shape)
        before = z0 + push
        if settings.cutmix_every and (i + 1) % settings.cutmix_every == 0 and i + 1 < len(table):
            plan = cutmix.plan(seed, ids, labels, i, settings.cutmix_alpha, *size)
            z, before = cutmix.apply(z, plan), cutmix.apply(before, plan)
    return z, in_microbatches(lambda rows: prior.decode(z[rows]).float(), len(z), micro)


ONE = SamplerSettings(cfg=3.0)
CASES = [
    (ONE, "ddim", 7),
    (replace(ONE, guidance_repeats=3, cutmix_every=2, cfg_to=0.5), "ddpm", 3),
    (replace(ONE, guidance_norm="none", guide_from=0.3, cutmix_every=1), "dpmpp2m", 2),
    (replace(ONE, gradient="unet", guide_from=0.4, guidance_repeats=2, cfg_from=0.4), "ddpm", 3),
]


@pytest.mark.parametrize("settings, kind, micro", CASES)
def test_the_loop_in_torch_is_bit_for_bit_the_one_written_out(settings, kind, micro):
    given = arguments(settings, kind)
    found = sample_group(*given, micro)
    latents, images = written_out(*given, micro)
    assert torch.equal(found.latents, latents) and torch.equal(found.images, images)


@pytest.mark.parametrize("settings, kind, micro", CASES)
def test_trajectories_in_triton_are_those_in_torch(settings, kind, micro):
    pytest.importorskip("triton", reason="the kernels need Triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted here; natively in tests/kernels")
    given = arguments(settings, kind)
    found, expected = sample_group(*given, micro, "triton"), sample_group(*given, micro)
    # float32: 1e-7 a launch, enlarged by the first step's 1/sqrt(abar) of 15, by CFG and by four guided steps
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-4)
    for name, curve in expected.curves.items():
        torch.testing.assert_close(found.curves[name], curve, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("micro", [7, 3])
def test_the_gradient_at_the_decoder_is_that_at_the_latent(micro, scale):
    """Times `unit`: loss scale and scaling factor, which the launch divides by in float32."""
    prior = FusedPrior(dtype=torch.float64)
    guidance = Guidance(prior.decode, classifier(dtype=torch.float64), LossWeights(0.3, 0.7), loss_scale=scale)
    there, z0 = guidance.at_decoder(prior), philox_normal(SEED, IDS, 0, (CHANNELS, SIDE, SIDE), torch.float64)
    x = replace(there.takes, dtype=None).of(z0)
    (found, losses), (expected, recorded) = (g.gradient(at, LABELS, micro) for g, at in ((there, x), (guidance, z0)))
    torch.testing.assert_close(found / there.unit, expected, rtol=1e-9, atol=1e-12)  # float64
    assert all(torch.allclose(losses[name], recorded[name]) for name in recorded)


class Kernel:
    """A kernel that counts its launches."""

    def __init__(self, kernel, seen, name):
        self.kernel, self.seen, self.name = kernel, seen, name

    def __getitem__(self, grid):
        self.seen.append(self.name)
        return self.kernel[grid]


class BesideTheNetworks(TorchDispatchMode):
    """Notes the operators that are called while no network runs."""

    def __init__(self):
        super().__init__()
        self.inside, self.seen = 0, []

    def around(self, network):
        def call(*args, **kwargs):
            self.inside += 1
            try:
                return network(*args, **kwargs)
            finally:
                self.inside -= 1

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings, wanted",
    [
        (ONE, ["clean", "update"] * STEPS),
        (replace(ONE, cutmix_every=1), ["clean", "update"] * STEPS),
        (replace(ONE, guide_from=0.5), ["update"] * 2 + ["clean", "update"] * 2),
        (replace(ONE, gradient="unet"), ["push", "update"] * STEPS),
        (replace(ONE, guidance_repeats=3), ["clean", "push", "push", "update"] * STEPS),  # one more for each repeat
    ],
)
def test_two_launches_a_step(settings, wanted, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    launched = []
    for name, module in (("clean", guided_clean), ("push", guided_push), ("update", guided_update)):
        monkeypatch.setattr(module, "_kernel", Kernel(module._kernel, launched, name))
    prior, guidance, *rest = arguments(settings, "ddpm")
    beside = BesideTheNetworks()
    steps_begin = []

    def denoise(z, t, context, network=prior.denoise):
        steps_begin.append(len(beside.seen))
        return network(z, t, context)

    monkeypatch.setattr(prior, "denoise", beside.around(denoise))
    monkeypatch.setattr(Guidance, "gradient", beside.around(Guidance.gradient))
    with beside:
        sample_group(prior, guidance, *rest, len(IDS), "triton")
    assert launched == wanted
    if settings.gradient == "latent":
        # between the first call of the UNet and the last nothing computes but these launches
        computed = {
            name for name in beside.seen[steps_begin[0] : steps_begin[-1]]
            if name.partition(".")[2].partition(".")[0] not in ("select", "split", "empty", "empty_like")
            and not name.startswith("dfkd.")
        }  # fmt: skip
        assert not computed


class NoWaiting(TorchDispatchMode):
    """While `armed`, fails where a value leaves the device: by an operator, or by a method that on a CPU calls none.

    The launches' own operators are left alone: on a CPU they are interpreted, or noise is made there.
    """

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
    METHODS = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__")

    def __init__(self, monkeypatch):
        super().__init__()
        self.armed, self.launched = False, set()
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.refusing(name, getattr(torch.Tensor, name)))

    def refusing(self, name, method):
        def call(*args, **kwargs):
            assert not self.armed, f"a value was asked for inside the loop: {name}"
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = str(func).partition(".")
        if self.armed and space == "dfkd":
            self.armed = False
            self.launched.add(name.partition(".")[0])
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.armed = True
        asks = name.partition(".")[0] in self.OPERATORS
        if name.startswith(("index.", "index_put")):  # by truth values: how many are true?
            asks = any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not (self.armed and asks), f"{func} inside the loop"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("settings, kind, micro", CASES)
def test_nothing_waits_for_the_device(settings, kind, micro, kernels, monkeypatch):
    """From the first call of the UNet to the last no value leaves the device: none is asked for, in any way."""
    if kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are not interpreted here")
    prior, guidance, *rest = arguments(settings, kind)
    weights = LossWeights(0.3, 0.7, 0.5)
    guidance = Guidance(prior.decode, guidance.teacher, weights, classifier(seed=9), kernels=kernels)
    whole = []  # calls of the UNet in a run that nobody watches

    def counting(z, t, context, network=prior.denoise):
        whole.append(t)
        return network(z, t, context)

    calls, network, waiting = [], prior.denoise, NoWaiting(monkeypatch)
    prior.denoise = counting
    sample_group(prior, guidance, *rest, micro, kernels)

    def denoise(z, t, context):
        calls.append(t)
        waiting.armed = len(calls) < len(whole)
        return network(z, t, context)

    prior.denoise = denoise
    with waiting:
        assert sample_group(prior, guidance, *rest, micro, kernels).latents.isfinite().all()
    assert len(calls) == len(whole) >= STEPS
    if kernels == "triton":
        assert {"guided_update", "soft_kl"} <= waiting.launched
    else:
        assert waiting.launched <= {"philox"}


@pytest.mark.parametrize("ask", [
    lambda x: x.item(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: bool(x), lambda x: x.nonzero(),
    lambda x: torch.nonzero(x), lambda x: x[x > 0], lambda x: torch.masked_select(x, x > 0),
    lambda x: torch.equal(x, x), lambda x: [0, 1][x.long()],
])  # fmt: skip
def test_waiting_is_noticed(ask, monkeypatch):
    waiting = NoWaiting(monkeypatch)
    with waiting:
        waiting.armed = True
        with pytest.raises(AssertionError, match="inside the loop"):
            ask(torch.ones(1))
        waiting.armed = False
