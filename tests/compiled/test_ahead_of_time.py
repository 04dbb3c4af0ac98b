"""Plans compiled for GPUs that are not here, and a machine with one of them that takes them over."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

from dfkd.cli import engines, generate
from dfkd.compiled.build import Workshop
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import DIGESTS, request
from dfkd.compiled.sets import read_set
from dfkd.compiled.sources import load_sources
from dfkd.errors import UsageError
from dfkd.teachers import Classifier, checkpoint
from dfkd.teachers import build as build_teacher
from dfkd_engine import backends
from dfkd_engine.compiled import load
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from dfkd_engine.targets import family
from tests.cli.small_generate import status_of
from tests.engine import stand_in_tensorrt
from tests.engine.stand_in_cuda import TARGETS, StandIn, Stream, fake_cuda
from tests.compiled.small_engines import NEEDS_IT, nudge, options_of

HERE = "cuda sm_89 NVIDIA L4"
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx (pip install 'dfkd[rtx]')")


@needs_rtx
@pytest.mark.trt
def test_the_command_compiles_for_what_is_not_here(prior, tmp_path, capfd):
    words = ("--engines", tmp_path, "--backend", "tensorrt-rtx", "--target", "sm_89,sm_80", "--only", "decode")
    given = ("--prior", prior, "--device", "cpu", "--guidance-step", 0, "--dtype", "fp16", "--group", 4)
    assert status_of(engines.main, "build", *words, "--", *given) == 0
    assert "ahead of time; it is judged on the GPU" in capfd.readouterr().err
    (manifest,) = EngineStore(tmp_path).list()
    assert manifest.spec.device == "cuda sm_80+sm_89" and manifest.spec.dtype == "float16"
    assert "parity" not in manifest.facts and len(manifest.facts["decoder_digest"]) == 64
    assert status_of(engines.main, "build", *words, "--", *given) == 0
    assert "1 engines of these options, 1 current" in capfd.readouterr().err
    assert status_of(engines.main, "list", "--engines", tmp_path) == 0
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("decode"))
    assert line.split()[1:8] == ["tensorrt-rtx", "sm_80", "sm_89", "4", "float16", "-", "-"]
    with pytest.raises(EngineError, match="it was built for cuda sm_80\\+sm_89, this is cpu"):
        load(EngineStore(tmp_path), manifest.key, "cpu")


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
def test_the_demo_compiles_for_all_targets(tmp_path, capfd):
    """The embedded prior's UNet and decoder, and the guidance gradient with a teacher of the demo's kind."""
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    module = build_teacher("resnet8_half", len(digits)).eval()
    checkpoint.save(
        tmp_path / "teacher", Classifier(module, "resnet8_half", digits, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    )
    words = ("--engines", tmp_path / "store", "--backend", "tensorrt-rtx", "--target", ",".join(TARGETS))
    only = ("--only", "unet,decode,gradient")
    given = ("--preset", "demo", "--dtype", "fp16", "--teacher-checkpoint", tmp_path / "teacher")
    assert status_of(engines.main, "build", *words, *only, "--", *given) == 0, capfd.readouterr().err
    found = EngineStore(tmp_path / "store").list()
    assert [manifest.spec.network for manifest in found] == ["decode", "gradient", "unet"]
    assert {manifest.spec.device for manifest in found} == {family(TARGETS)}


@pytest.mark.parametrize(
    "backend, target, said",
    [
        ("tensorrt-rtx", "sm_90", "cannot compile for sm_90 without that GPU"),
        ("tensorrt-rtx", "H100", "the target 'H100' is unknown"),
        ("onnxruntime", "sm_89", "onnxruntime compiles for the machine that it is on, not for sm_89"),
    ],
)
def test_targets_that_cannot_be_met_are_refused_before_networks_are_loaded(
    backend, target, said, prior, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(backends.tensorrt, "missing", lambda *names: [])
    monkeypatch.setattr("dfkd.compiled.sources.load_networks", None)
    words = ("--engines", tmp_path, "--backend", backend, "--target", target, "--only", "decode")
    assert status_of(engines.main, "build", *words, "--", "--prior", prior, "--guidance-step", 0) == 2
    assert said in capfd.readouterr().err


def test_generate_refuses_a_backend_that_cannot_run_here(prior, teacher, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(backends.tensorrt, "missing", lambda *names: [])
    words = ("--out", tmp_path / "out", "--prior", prior, "--teacher-checkpoint", teacher, "--device", "cpu")
    assert status_of(generate.main, *words, "--backend", "tensorrt-rtx", "--steps", 2) == 2
    assert "--backend tensorrt-rtx cannot be used: it compiles for a CUDA device" in capfd.readouterr().err


def test_a_set_names_its_targets(tmp_path):
    file = tmp_path / "sets.toml"
    file.write_text(
        '[a]\nbackends = ["tensorrt-rtx"]\ntargets = ["sm_89"]\n[a.generate]\npreset = "demo"\nteacher = "x"'
    )
    assert read_set(file, "a").targets == ("sm_89",)


class Shop:
    """A workshop whose tensorrt-rtx is a stand-in that counts what it compiles."""

    def __init__(self, root, prior, teacher, monkeypatch):
        self.options, self.compiled = options_of(prior, teacher, "--micro-batch", 4, "--bn-stats", "image"), 0
        self.root = root
        library = stand_in_tensorrt.library(rtx=True, version="1.7.1")
        Stream.events = library.events
        backend = StandIn(library, rtx=True)
        backend.library().Builder.build_serialized_network = self._counted(library.Builder.build_serialized_network)
        monkeypatch.setitem(backends.BACKENDS, "tensorrt-rtx", backend)
        self.shop = Workshop(EngineStore(root), lambda: load_sources(self.options, ["decode"]))

    def _counted(self, build):
        def counted(builder, network, config):
            self.compiled += 1
            return build(builder, network, config)

        return counted

    def request(self, network, device):
        return request(self.options, network, "tensorrt-rtx", device, FileDigests(self.root / DIGESTS))

    def build(self, network, device):
        return self.shop.build(self.request(network, device))


@NEEDS_IT
def test_a_machine_with_such_a_gpu_takes_over_what_was_compiled(prior, teacher, tmp_path, monkeypatch):
    fake_cuda(monkeypatch, tmp_path / "cache")
    shop = Shop(tmp_path / "store", prior, teacher, monkeypatch)
    state, ahead = shop.build("decode", family(("sm_86", "sm_89")))
    assert (state, shop.compiled) == ("built", 1) and "parity" not in ahead.facts
    state, own = shop.build("decode", HERE)
    assert (state, shop.compiled) == ("built", 1)  # taken over: nothing was compiled
    assert own.facts["compiled_ahead"] == ahead.key and own.spec == replace(ahead.spec, device=HERE)
    assert 0 < own.facts["parity"]["relative"] < 1e-5 and own.facts["milliseconds"]["rows"] == 4
    assert own.facts["ways"].keys() == {"launches", "cuda graph"}
    assert shop.build("decode", HERE).state == "current"


@NEEDS_IT
def test_what_was_compiled_for_others_is_not_taken_over(prior, teacher, tmp_path, monkeypatch):
    fake_cuda(monkeypatch, tmp_path / "cache")
    shop = Shop(tmp_path / "store", prior, teacher, monkeypatch)
    shop.build("decode", family(("sm_80", "sm_120")))
    assert "compiled_ahead" not in shop.build("decode", HERE).manifest.facts and shop.compiled == 2


@NEEDS_IT
def test_a_changed_weight_is_not_taken_over(prior, teacher, tmp_path, monkeypatch, copied):
    fake_cuda(monkeypatch, tmp_path / "cache")
    other = copied(prior)
    nudge(next((other / "vae").glob("*.safetensors")))
    Shop(tmp_path / "store", other, teacher, monkeypatch).build("decode", family(("sm_89",)))
    shop = Shop(tmp_path / "store", prior, teacher, monkeypatch)
    assert "compiled_ahead" not in shop.build("decode", HERE).manifest.facts and shop.compiled == 1


SD15_UNET = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip


def test_no_plan_asks_for_more_than_a_tensor_holds(prior, teacher, tmp_path, copied):
    """Stable Diffusion 1.5 at 512x512: 204 rows of the UNet, 31 images of the decoder."""
    folder = copied(prior)
    for part, changes in (("unet", SD15_UNET), ("vae", {"_class_name": "AutoencoderKL"})):
        file = folder / part / "config.json"
        config = json.loads(file.read_text()) | changes
        if part == "vae":
            config = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
        file.write_text(json.dumps(config))
    memory = FileDigests(tmp_path / DIGESTS)

    def rows(network, *more):
        options = options_of(folder, teacher, "--group", 512, "--batch", 512, *more)
        return request(options, network, "tensorrt-rtx", HERE, memory).batch[2]

    assert rows("unet", "--bn-stats", "image") == 204 and rows("unet", "--cfg", 1, "--bn-stats", "image") == 204
    assert rows("decode", "--bn-stats", "image") == rows("gradient", "--bn-stats", "image") == 31
    assert rows("decode", "--size", 256) == 127 and rows("decode", "--micro-batch", 16) == 16
    with pytest.raises(UsageError, match="one image of 8192 pixels a side is too large for the decode"):
        rows("decode", "--size", 8192)
    with pytest.raises(UsageError, match=r"a group of 512 images of 512 pixels a side .* at most 16"):
        rows("gradient")


def test_plans_have_the_rows_of_the_calls(prior, teacher, tmp_path, monkeypatch):
    """Kernels are chosen for one shape: another --micro-batch is another engine, where a range serves all."""
    options = options_of(prior, teacher, "--micro-batch", 4, "--bn-stats", "image")
    memory = FileDigests(tmp_path / DIGESTS)
    for network, rows in (("unet", 8), ("decode", 4), ("gradient", 4)):
        fixed = request(options, network, "tensorrt-rtx", HERE, memory)
        assert fixed.batch == (1, rows, rows) and fixed.recipe["batch"] == f"1 to {rows}"
        whole = 12 if network == "unet" else 6
        assert request(options, network, "onnxruntime", HERE, memory).batch == (1, whole, whole)
