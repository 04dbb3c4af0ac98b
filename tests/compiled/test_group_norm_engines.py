"""Inductor's engines with the kernel's group norms: asked for, or the quicker of two; no other backend sees any."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from dfkd.config import STORED_BACKENDS
from dfkd.cli import engines, generate
from dfkd.compiled import build
from dfkd.compiled.build import Workshop
from dfkd.compiled.requests import group_norm_of
from dfkd.compiled.sources import load_sources
from dfkd.data.shards import read_folder
from dfkd_engine.backends import get
from dfkd_engine.group_norms import KERNELS, group_norms, set_group_norms
from dfkd_engine.spec import EngineSpec, TensorSpec, differing
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import status_of
from tests.compiled.small_engines import options_of, recipes, words

pytest.importorskip("triton", reason="the kernels need Triton")

CPU, GPU = "cpu x86_64 avx2", "cuda sm_90 NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    "kernels, device, wanted",
    [
        ("auto", CPU, "torch"),
        ("torch", CPU, "torch"),
        ("triton", CPU, "triton"),
        ("auto", GPU, "quicker"),
        ("torch", GPU, "torch"),
        ("triton", GPU, "triton"),
    ],
)
def test_which_group_norm(prior, teacher, kernels, device, wanted):
    options = options_of(prior, teacher, "--kernels", kernels)
    for backend in STORED_BACKENDS:
        for network in ("unet", "decode", "gradient", "decode_vjp", "pixel_gradient", "image_moments"):
            found = group_norm_of(options, network, backend, device)
            has = backend == "inductor" and network in ("unet", "decode", "gradient", "decode_vjp")
            assert found == (wanted if has else "torch")


def test_the_choice_is_part_of_the_recipe(prior, teacher, tmp_path):
    plain, fused = (
        recipes(options_of(prior, teacher, "--kernels", name), "inductor", tmp_path) for name in ("torch", "triton")
    )
    changed = {name for name, *_ in differing(plain["unet"].recipe, fused["unet"].recipe)}
    assert changed == {"flags.group_norm", "sources"}
    assert "flags.group_norm" not in plain["unet"].recipe
    own, theirs = (
        recipes(options_of(prior, teacher, "--kernels", name), "onnxruntime", tmp_path) for name in ("torch", "triton")
    )
    assert {name: r.recipe for name, r in own.items()} == {name: r.recipe for name, r in theirs.items()}
    assert "--kernels triton" in generate.build_command(options_of(prior, teacher, "--kernels", "triton"))


class TwoWays:
    """A backend whose engine of a graph takes as long as the graph says."""

    def compile(self, graph, spec, folder):
        (folder / "engine").write_text(str(graph.seconds))

    def load(self, folder, spec, device):
        seconds = float((folder / "engine").read_text())

        def run(x):
            clock.now += seconds
            return (x + 1,)

        return run


clock = SimpleNamespace(now=0.0)


@pytest.mark.parametrize("torch_seconds, triton_seconds, kept", [(2.0, 1.0, "triton"), (1.0, 2.0, "torch")])
def test_the_quicker_of_two_is_kept(torch_seconds, triton_seconds, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(build.time, "perf_counter", lambda: clock.now)
    x, y = ((TensorSpec(name, (None, 2), "float32"),) for name in "xy")
    spec = EngineSpec("unet", "g", "w", x, y, (1, 4, 4), "float32", "inductor", (), "cpu", ())
    graphs = {"torch": SimpleNamespace(seconds=torch_seconds), "triton": SimpleNamespace(seconds=triton_seconds)}
    found = build._quicker(TwoWays(), graphs, spec, tmp_path, torch.device("cpu"), (torch.zeros(4, 2),))
    wanted = {"torch": 1000 * torch_seconds, "triton": 1000 * triton_seconds}
    assert found == {"kept": kept, "milliseconds": wanted}
    assert [file.name for file in tmp_path.iterdir()] == ["engine"]
    assert (tmp_path / "engine").read_text() == str(min(torch_seconds, triton_seconds))


def test_networks_come_plain_and_the_judge_stays_plain(prior, teacher):
    sources = load_sources(options_of(prior, teacher), ["unet"])
    assert group_norms(sources.prior.unet).fused == 0
    set_group_norms(sources.prior.unet, "triton")
    doubled = sources.doubled()
    assert group_norms(doubled.prior.unet).fused == 0 < group_norms(sources.prior.unet).fused


class Unchanged:
    """Inductor's place, taken by graphs that run as they were traced: seconds instead of minutes."""

    name, stored, fixed_rows, targets = "inductor", True, False, ()

    def __init__(self):
        self.graphs = {}

    def unusable(self, device, dtype="float32"):
        return None

    def compile(self, graph, spec, folder):
        number = str(len(self.graphs))
        self.graphs[number] = graph
        (folder / "engine").write_text(number)

    def load(self, folder, spec, device):
        return self.graphs[(folder / "engine").read_text()]


SMALL = ("--group", "2", "--batch", "2", "--cfg", "1", "--kernels", "triton")  # two rows: the kernel is interpreted


def test_both_are_built_and_the_quicker_is_judged_and_listed(prior, teacher, tmp_path, monkeypatch, capsys):
    instead = Unchanged()
    monkeypatch.setattr(build, "get", lambda name: instead)
    options = options_of(prior, teacher, *SMALL)
    request = recipes(options, "inductor", tmp_path)["unet"]
    request.recipe["flags.group_norm"] = "quicker"
    loaded = load_sources(options, ["unet"])
    store = EngineStore(tmp_path / "engines")
    state, manifest = Workshop(store, lambda: loaded, kernels="triton").build(request)
    plain, fused = instead.graphs.values()
    used = [bool(KERNELS & {node.target for node in graph.module.graph.nodes}) for graph in (plain, fused)]
    assert state == "built" and used == [False, True]
    measured = manifest.facts["group_norm"]
    assert measured["kept"] == min(measured["milliseconds"], key=measured["milliseconds"].get)
    assert set(measured["milliseconds"]) == {"torch", "triton"}
    assert dict(manifest.spec.flags)["group_norm"] == "quicker" and manifest.facts["parity"]["relative"] < 1e-5
    assert manifest.spec.graph not in (plain.structure(), fused.structure())
    assert group_norms(loaded.prior.unet).fused == 0  # though eager was timed with the kernel
    engines.listing(engines.ListOptions(engines=tmp_path / "engines"), ())
    assert f"{measured['kept']} (torch " in capsys.readouterr().err


def test_generate_runs_with_the_kernel_and_says_so(prior, teacher, tmp_path, capsys):
    images = {}
    for kernels in ("torch", "triton"):
        out = tmp_path / kernels
        more = ("--out", out, "--count", 2, *SMALL, "--steps", 1, "--backend", "eager", "--kernels", kernels)
        assert status_of(generate.main, *words(prior, teacher, *more)) == 0
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if "group norms" in line]
        found = json.loads((out / "result.json").read_text())["kernels"].get("group_norms")
        if kernels == "torch":
            assert not said and found is None
        else:
            count = re.fullmatch(
                r"  where the unet is eager: (\d+) of (\d+) group norms, (\d+) with their SiLU", said[0]
            )
            assert count and count[1] == count[2] and 0 < int(count[3]) <= int(count[1])
            assert said[1] == "  where the vae is eager: 0 of 0 group norms, 0 with their SiLU"
            assert found == {line.split()[2]: line.partition(": ")[2] for line in said}
        images[kernels] = read_folder(out).images.int()
    assert (images["torch"] - images["triton"]).abs().max() <= 2  # of 255: rounding, one step on


@pytest.mark.slow
@pytest.mark.skipif(get("inductor").unusable("cpu") is not None, reason="inductor cannot be used here")
def test_an_engine_that_calls_the_kernel(prior, teacher, tmp_path, capsys):
    """Compiled around the kernel by inductor itself, and judged against float64."""
    options = options_of(prior, teacher, *SMALL)
    request = recipes(options, "inductor", tmp_path)["unet"]
    store = EngineStore(tmp_path / "engines")
    state, manifest = Workshop(store, lambda: load_sources(options, ["unet"])).build(request)
    assert state == "built" and manifest.facts["parity"]["relative"] < 1e-5
    assert dict(manifest.spec.flags)["group_norm"] == "triton"
    engines.listing(engines.ListOptions(engines=tmp_path / "engines"), ())
    assert " triton " in capsys.readouterr().err
