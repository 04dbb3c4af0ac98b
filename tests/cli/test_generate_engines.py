"""dfkd-generate on compiled engines: the images of eager networks, begun, killed, continued and refused."""

import json
import shlex

import pytest
import torch

from dfkd.cli import engines, generate
from dfkd.compiled.guidance import CompiledGuidance
from dfkd.synthesis.run import Synthesis
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import images_of, last_line, shards_of, status_of
from tests.cli.test_generate_killed import check_killed
from tests.compiled.small_engines import (
    BACKEND,
    NEEDS_IT,
    flip_a_byte,
    key_of,
    measured,
    set_facts,
)

pytestmark = NEEDS_IT

NETWORKS = ("unet", "decode", "gradient")
LOADED = "from diffusers import AutoencoderTiny, UNet2DConditionModel\nfrom transformers import CLIPTextConfig\n"
LOADED += "from transformers import CLIPTextModel, CLIPTokenizer\nimport onnxruntime\n"


def generated(place, out, *more):
    """Exit status of a run of 8 images."""
    argv = ["--engines", place.store, "--count", 8, "--cutmix-every", 1, "--seed", 3, *place.words(*more)]
    return status_of(generate.main, "--out", out, *argv)


@pytest.fixture(scope="module")
def eager(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("eager") / "out"
    assert generated(place, out, "--backend", "eager") == 0
    return out


def largest_difference(one, other):
    return (images_of(one).images.int() - images_of(other).images.int()).abs().max().item()


def engines_used(out):
    backends = json.loads((out / "result.json").read_text())["backends"]
    return {name for name, use in backends.items() if use["backend"] == BACKEND}


def test_the_images_are_those_of_eager_networks(place, eager, tmp_path, capsys):
    capsys.readouterr()
    assert generated(place, tmp_path / "out", "--backend", BACKEND) == 0
    said = capsys.readouterr()
    why = f"--backend {BACKEND}"
    assert last_line(said.out)["backends"] == {name: {"backend": BACKEND, "why": why} for name in NETWORKS}
    assert json.loads((tmp_path / "out/result.json").read_text())["backends"]["unet"]["backend"] == BACKEND
    assert f"unet, decode, gradient: {BACKEND} ({why})" in said.err
    assert largest_difference(eager, tmp_path / "out") <= 2
    ours, theirs = images_of(tmp_path / "out"), images_of(eager)
    assert torch.equal(ours.labels, theirs.labels) and ours.images.float().std(0).mean() > 2
    for one, other in zip(ours.records, theirs.records, strict=True):
        assert one.partner == other.partner and one.losses.keys() == other.losses.keys() == {"cls", "bn"}
        assert one.losses["cls"] == pytest.approx(other.losses["cls"], rel=1e-3)
    result = json.loads((eager / "result.json").read_text())
    assert result["backends"]["decode"] == {"backend": "eager", "why": "--backend eager"}
    assert "engines" not in json.loads((eager / "manifest.json").read_text())["settings"]
    settings = json.loads((tmp_path / "out/manifest.json").read_text())["settings"]
    assert settings["engines"] == {name: key_of(place.store, name) for name in NETWORKS}


def test_no_image_depends_on_the_batch(own, eager, tmp_path):
    for network in NETWORKS:
        set_facts(own.store, network, milliseconds=measured(1.0, 2.0))
    for batch in (4, 64, 512):
        out = tmp_path / str(batch)
        assert generated(own, out, "--batch", batch) == 0
        assert engines_used(out) == set(NETWORKS)
        assert largest_difference(eager, out) <= 2
    assert shards_of(tmp_path / "4") == shards_of(tmp_path / "64") == shards_of(tmp_path / "512")


def test_a_named_backend_splits_the_gradient_of_a_cut_group(own, eager, tmp_path, capsys):
    cut = ("--micro-batch", 4)
    assert generated(own, tmp_path / "out", *cut, "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "for image_moments, image_gradient, decode_vjp" in error and "--micro-batch 4" in error
    build = ["build", "--backend", BACKEND, "--engines", own.store]
    assert status_of(engines.main, *build, "--", *own.words(*cut)) == 0
    assert generated(own, tmp_path / "out", *cut, "--backend", BACKEND) == 0
    assert engines_used(tmp_path / "out") == {"unet", "decode", "image_moments", "image_gradient", "decode_vjp"}
    assert largest_difference(eager, tmp_path / "out") <= 2


def test_auto_says_what_it_chose_and_goes_on_with_it(own, tmp_path, capsys):
    set_facts(own.store, "unet", milliseconds=measured(1.0, 2.0))
    set_facts(own.store, "decode", milliseconds=measured(2.0, 1.0))
    set_facts(own.store, "gradient", milliseconds=measured(1.0, 2.0))
    out = tmp_path / "out"
    assert generated(own, out) == 0
    said = capsys.readouterr()
    backends = {name: use["backend"] for name, use in last_line(said.out)["backends"].items()}
    assert backends == {"unet": BACKEND, "decode": "eager", "gradient": BACKEND}
    assert f"decode: eager (1.0 ms a call, {BACKEND} 2.0: 6 rows, 1 threads, when it was built)" in said.err
    before = shards_of(out)
    # other measurements later: the folder is finished as it was begun
    for name in NETWORKS:
        set_facts(own.store, name, milliseconds=measured(2.0, 1.0) if name != "decode" else measured(1.0, 2.0))
    next(out.glob("shard-*.tar")).unlink()
    assert generated(own, out) == 0
    said = capsys.readouterr()
    assert {name: use["backend"] for name, use in last_line(said.out)["backends"].items()} == backends
    assert "the folder was begun with it" in said.err and shards_of(out) == before
    # and not at all once they are gone
    EngineStore(own.store).prune({key_of(own.store, "decode")})
    next(out.glob("shard-*.tar")).unlink()
    assert generated(own, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "this folder cannot be continued: it was begun with the unet engine" in error and "dfkd-engines" in error


def test_a_folder_of_eager_networks_stays_so(own, eager, tmp_path, capsys):
    """Engines that were built in between do not get into it, by `auto`; by name they are refused."""
    for name in NETWORKS:
        set_facts(own.store, name, milliseconds=measured(1.0, 2.0))
    out = tmp_path / "out"
    assert generated(own._replace(store=tmp_path / "none"), out) == 0
    assert shards_of(out) == shards_of(eager)
    next(out.glob("shard-*.tar")).unlink()
    assert generated(own, out) == 0
    assert shards_of(out) == shards_of(eager)
    assert "eager (the folder was begun with it)" in capsys.readouterr().err
    assert generated(own, out, "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"engines.unet is (absent) there and {key_of(own.store, 'unet')} here" in error


def test_without_engines_a_named_backend_is_refused_with_the_command(place, tmp_path, capsys):
    empty = place._replace(store=tmp_path / "none")
    assert generated(empty, tmp_path / "out", "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    command = f"dfkd-engines build --backend {BACKEND} --engines {tmp_path / 'none'} -- "
    assert f"there is no {BACKEND} engine in {tmp_path / 'none'} for unet, decode, gradient" in error
    assert command in error and not list((tmp_path / "out").glob("shard-*"))
    assert generated(place, tmp_path / "out", "--backend", BACKEND, "--gradient", "unet") == 2
    assert f"--gradient unet cannot run on --backend {BACKEND}" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_engine_is_never_loaded(own, tmp_path, capsys, monkeypatch):
    flip_a_byte(own.store, "gradient")
    monkeypatch.setattr("onnxruntime.InferenceSession", sessions := Sessions())
    assert generated(own, tmp_path / "out", "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the engine gradient {key_of(own.store, 'gradient')} in {own.store} is damaged" in error
    assert "mend it with dfkd-engines build" in error and not list((tmp_path / "out").glob("shard-*"))
    assert not any("gradient" in name for name in sessions.loaded)


class Sessions:
    """onnxruntime.InferenceSession that keeps a list of what it loads."""

    def __init__(self):
        import onnxruntime

        self.real, self.loaded = onnxruntime.InferenceSession, []

    def __call__(self, model, *arguments, **options):
        session = self.real(model, *arguments, **options)
        self.loaded += [result.name for result in session.get_outputs()]
        return session


def test_killed_anywhere_it_ends_with_the_same_bytes(place, tmp_path):
    argv = ["--engines", place.store, "--backend", BACKEND, "--count", 22, "--shard-size", 6, *place.words()]
    check_killed(tmp_path, argv, LOADED)
    assert json.loads((tmp_path / "killed/result.json").read_text())["backends"]["unet"]["backend"] == BACKEND


class TestOutOfMemory:
    """A group is six images: a whole group's gradient is one engine, a part's another."""

    @staticmethod
    def tight(monkeypatch, most):
        real = CompiledGuidance.of_batch

        def of_batch(self, latents, *rest):
            if SAMPLING and len(latents) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(self, latents, *rest)

        sample = Synthesis.sample
        SAMPLING = []

        def sampled(self, *arguments):
            SAMPLING.append(True)
            try:
                return sample(self, *arguments)
            finally:
                SAMPLING.clear()

        monkeypatch.setattr(CompiledGuidance, "of_batch", of_batch)
        monkeypatch.setattr(Synthesis, "sample", sampled)

    @pytest.mark.parametrize("backend", ["auto", BACKEND])
    def test_an_engine_of_the_whole_group_names_those_of_its_parts(self, own, tmp_path, capsys, monkeypatch, backend):
        for name in NETWORKS:
            set_facts(own.store, name, milliseconds=measured(1.0, 2.0))
        with monkeypatch.context() as patch:
            self.tight(patch, 5)
            assert generated(own, tmp_path / "out", "--backend", backend) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"the {BACKEND} engine of the gradient takes a whole group" in error and "another --out" in error
        assert "the next run takes 3 images a call" in error and not list((tmp_path / "out").glob("shard-*"))
        command = shlex.split(error.partition("(dfkd-engines ")[2].partition(") and run again")[0])
        assert command[0] == "build" and command[command.index("--micro-batch") + 1] == "3"
        # the folder keeps what it was begun with
        assert generated(own, tmp_path / "out", "--backend", backend) == 2
        assert "engines.gradient is" in (again := capsys.readouterr().err) or "there is no" in again
        if backend != "auto":
            assert generated(own, tmp_path / "other", "--backend", backend) == 2
            assert "for image_moments, image_gradient, decode_vjp" in capsys.readouterr().err
            assert status_of(engines.main, *command) == 0
        assert generated(own, tmp_path / "other", "--backend", backend) == 0
        result = json.loads((tmp_path / "other/result.json").read_text())
        assert result["rows"]["gradient"] == 3 and result["plan"]["calls"]["gradient"]["bound"] == "remembered"
        parts = {"image_moments", "image_gradient", "decode_vjp"} if backend != "auto" else set()
        assert engines_used(tmp_path / "other") == {"unet", "decode"} | parts

    def test_an_eager_gradient_goes_on_beside_engines(self, own, tmp_path, capsys, monkeypatch):
        for name in NETWORKS:
            set_facts(own.store, name, milliseconds=measured(2.0, 1.0) if name == "gradient" else measured(1.0, 2.0))
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            self.tight(patch, 5)
            assert generated(own, out) == 0
        assert "gradient: out of memory with 6 images a call" in capsys.readouterr().err
        assert engines_used(out) == {"unet", "decode"}
        recorded = json.loads((out / "manifest.json").read_text())["settings"]["engines"]
        assert recorded.keys() == {"unet", "decode"}
        before = shards_of(out)
        next(out.glob("shard-*.tar")).unlink()
        assert generated(own, out) == 0 and shards_of(out) == before  # and is finished with the same calls

    def test_seconds_of_an_engine_are_those_of_its_build(self, own, tmp_path, capsys):
        for name in NETWORKS:
            set_facts(own.store, name, milliseconds=measured(600.0, 900.0))  # of 6 rows
        assert generated(own, tmp_path / "out", "--plan-only", "--cfg", 3) == 0
        timings = last_line(capsys.readouterr().out)["plan"]["timings"]
        # six images are twelve rows of the UNet, two steps of it
        assert timings["unet"] == {"seconds": 1.2, "calls_per_group": 2, "source": "engine, when it was built"}
        assert timings["decode"]["seconds"] == timings["gradient"]["seconds"] == 0.6
