"""Ranges by ModelOpt: which layers, on which inputs; the graph computes what ModelOpt simulates."""

import copy

import pytest
import torch
from torch import nn

from dfkd.compiled import calibration, engines
from dfkd.compiled.calibration import magnitudes
from dfkd.compiled.engines import build
from dfkd_engine.errors import EngineError
from dfkd_engine.parity import TOLERANCE
from tests.compiled.small_functions import BACKEND, NEEDS_IT, Network, decode, samples


def run(network):
    for seed in range(3):
        network(*samples(4, seed))


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra quantise)")
    return magnitudes(Network(), run, "int8")


def test_magnitudes_are_those_of_the_run(found):
    """Compared with hooks; the ends of the network stay wide, and the network itself as it was."""
    network, seen = Network(), []
    network.middle.register_forward_hook(lambda layer, given, _: seen.append(given[0].abs().max().item()))
    run(network)
    assert list(found) == ["middle"] and found["middle"].input == pytest.approx(max(seen), rel=1e-5)
    assert torch.equal(found["middle"].weight, network.middle.weight.flatten(1).abs().amax(1))
    before = copy.deepcopy(network.state_dict())
    magnitudes(network, run, "int8")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("narrow", ["int8", "fp8"])
def test_the_graph_computes_what_modelopt_simulates(found, narrow):
    """ModelOpt's own fake-quantised network, which nothing of dfkd_engine/quantise.py is in."""
    import modelopt.torch.quantization as mtq

    function = decode(quantise=narrow, calibrate=run)
    graph = engines._in_eight_bits(function, engines._traced(function, "torch"))
    simulated = copy.deepcopy(function.networks[0])
    mtq.quantize(simulated, calibration._config(narrow), run)
    (x,) = samples(5, 9)
    with torch.no_grad():
        want, wide = simulated(x), function.networks[0](x)
    (got,) = graph(x)
    assert (wide - want).norm() > 1e-3 * want.norm()  # eight bits are seen
    assert (got - want).norm() < 0.05 * (wide - want).norm()


@NEEDS_IT
def test_an_engine_in_eight_bits(found, store):
    """Judged by the tolerance of its bits; another engine than the wide one."""
    function = decode(quantise="int8", calibrate=run)
    state, manifest = build(function, BACKEND, store)
    assert state == "built" and manifest.spec.flags["quantise"] == "int8"
    assert 1e-4 < manifest.facts["parity"]["relative"] < TOLERANCE["forward", "int8"].relative
    assert store.find(engines.engine_spec(decode(), BACKEND, manifest.spec.device)) is None


def test_without_modelopt_it_is_refused(monkeypatch):
    monkeypatch.setattr(calibration, "missing", lambda name: [name])
    with pytest.raises(EngineError, match=r"no int8 network can be built.*pip install 'dfkd\[quantise\]'"):
        magnitudes(nn.Linear(2, 2), run, "int8")
