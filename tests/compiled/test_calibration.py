"""Calibration by ModelOpt: which layers, on which inputs, always alike; and the graph is what ModelOpt simulates."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dfkd.cli.prepare import load_networks
from dfkd.compiled import calibration
from dfkd.compiled.calibration import GROUPS, calibrate
from dfkd.compiled.functions import Sources, function, samples
from dfkd.errors import UsageError
from dfkd.synthesis.schedule import build_table
from dfkd_engine.errors import EngineError
from dfkd_engine.graph import trace
from dfkd_engine.quantise import quantised
from tests.compiled.small_engines import options_of

# cfg doubles the rows: both prompts are calibrated on
OPTIONS = ("--prompt", "a {label}", "--cfg", 2, "--steps", 3)


@pytest.fixture(scope="module")
def options(prior, teacher):
    return options_of(prior, teacher, *OPTIONS)


@pytest.fixture(scope="module")
def networks(options):
    return load_networks(options, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(options, networks):
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra quantise)")
    return calibrate(options, networks, "int8")


def of_inputs(options, prior):
    """Largest magnitude that reaches each layer on the calibration's own trajectories, by hooks."""
    seen, hooks = {}, []
    for name, layer in prior.unet.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):

            def see(layer, given, _, name=name):
                seen[name] = max(seen.get(name, 0.0), given[0].abs().max().item())

            hooks.append(layer.register_forward_hook(see))
    table = build_table(prior.scheduler_config, options.sampler, options.steps)
    for group in range(GROUPS):
        calibration._denoise(options, prior, table, calibration._prompts(options), group)
    for hook in hooks:
        hook.remove()
    return seen


def test_magnitudes_are_those_of_the_trajectories(options, networks, found):
    seen = of_inputs(options, networks)
    layers = dict(networks.unet.named_modules())
    assert found.keys() < seen.keys()
    for name, amax in found.items():
        assert amax.input == pytest.approx(seen[name], rel=1e-5)
        assert torch.equal(amax.weight, layers[name].weight.flatten(1).abs().amax(1))


def test_the_ends_time_and_skips_stay_wide(networks, found):
    every = {n for n, layer in networks.unet.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    wide = every - found.keys()
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= wide
    assert all(name.startswith(("conv_in", "conv_out")) or "time_emb" in name or "shortcut" in name for name in wide)
    assert any(name.endswith("conv_shortcut") for name in wide)
    # ModelOpt's presets would leave these out, as a language model's last layer
    assert any(name.endswith("proj_out") for name in found)


def test_the_same_options_give_the_same_and_the_network_stays(options, networks, found):
    before = {name: value.clone() for name, value in networks.unet.state_dict().items()}
    again = calibrate(replace(options, seed=7), networks, "int8")
    assert again.keys() == found.keys()
    assert all(again[n].input == found[n].input and torch.equal(again[n].weight, found[n].weight) for n in found)
    after = networks.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_prompts_and_steps_decide(options, networks, found):
    words = calibrate(replace(options, prompt="an unlike {label}"), networks, "int8")
    assert any(words[name].input != found[name].input for name in found if ".attn2.to_k" in name)
    steps = calibrate(replace(options, steps=2), networks, "int8")
    assert any(steps[name].input != found[name].input for name in found)


def test_prompts_are_the_runs(options):
    prompts = calibration._prompts(options)
    assert prompts[:4] == ["a zero", "a one", "a two", "a zero"] and len(prompts) == GROUPS * calibration.IMAGES
    assert calibration._prompts(replace(options, only=("two",)))[:2] == ["a two", "a two"]
    assert (
        calibration._prompts(replace(options, prompt="a photo", only=("two",), teacher_checkpoint=None))[0] == "a photo"
    )
    with pytest.raises(UsageError, match="unknown class 'ten'"):
        calibration._prompts(replace(options, only=("ten",)))


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
def test_the_graph_computes_what_modelopt_simulates(options, networks, found, narrow, monkeypatch):
    """ModelOpt's own fake-quantised UNet, which nothing of engine/quantise.py is in."""
    import modelopt.torch.quantization as mtq

    kept = []
    whole = mtq.quantize
    monkeypatch.setattr(mtq, "quantize", lambda unet, *rest: kept.append(whole(unet, *rest)))
    layers = calibrate(options, networks, narrow)
    sources = Sources(networks, None, None, networks.latent_size)
    unet = function("unet", sources)
    traced = trace(unet.call, unet.inputs, output_names=unet.outputs)
    root = "s.prior.unet"
    narrowed = quantised(traced, {f"{root}.{name}": amax for name, amax in layers.items()}, narrow)
    given = samples("unet", sources, 4, 0)
    with torch.no_grad():
        want = function("unet", replace(sources, prior=replace(networks, unet=kept[0]))).call(*given)[0]
    got, exact = narrowed(*given)[0], traced(*given)[0]
    error = (want - exact).norm()
    assert error > 1e-3 * exact.norm()
    assert (got - want).norm() < error / 3  # a value in the next of 256 steps here and there


def test_without_modelopt_it_says_what_to_install(options, networks, monkeypatch):
    monkeypatch.setattr(calibration, "missing", lambda *names: list(names))
    with pytest.raises(EngineError, match=r"no fp8 UNet can be built: ModelOpt.*pip install 'dfkd\[quantise\]'"):
        calibrate(options, networks, "fp8")
