"""dfkd-generate by engines, from dfkd-engines build to images: equal to eager but for rounding.

What is traced stands in the place of what a compiler would make of it, since the compilers have tests of their own.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from dfkd.cli import engines, generate
from dfkd.data import read_folder, read_manifest
from dfkd.teachers import Classifier
from dfkd_engine.backends import BACKENDS
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import CLASS_NAMES, last_line, shards_of, status_of
from tests.compiled.small_functions import Unchanged, milliseconds, set_facts
from tests.tiny_sd import make_tiny_sd

BACKEND = "onnxruntime"
NETWORKS = ("unet", "decode", "gradient")
LOSS = """
from dataclasses import dataclass
from dfkd.synthesis.losses import GuidanceLoss

@dataclass(frozen=True)
class Brightness(GuidanceLoss):
    def __call__(self, seen):
        return seen.images.flatten(1).mean(1)
"""
UNET = {
    "block_out_channels": (4,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("UpBlock2D",), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2,
    "sample_size": 4,
}  # fmt: skip
VAE = {
    "encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4),
    "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
}  # fmt: skip


def teacher_network(num_classes: int) -> nn.Module:
    """Two BatchNorm layers, smooth; images of 8x8."""
    first = (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.SiLU())
    second = (nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes))


def make_teacher(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = teacher_network(len(CLASS_NAMES)).eval()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(torch.randn(layer.num_features) / 3)
                layer.running_var.copy_(torch.rand(layer.num_features) + 0.2)
    architecture = f"file:{Path(__file__)}:teacher_network"
    teacher = Classifier(module, CLASS_NAMES, (0.5, 0.4, 0.6), (0.25, 0.2, 0.3), 8, architecture)
    teacher.save_pretrained(folder)
    return folder


class Place(SimpleNamespace):
    """prior, teacher: folders. store: of the engines of a guided run, in groups of six."""

    def words(self, *more):
        given = ("--prior", self.prior, "--teacher-checkpoint", self.teacher, "--device", "cpu")
        return (*given, "--group", 6, "--steps", 2, *more)

    def build(self, *more, options=()):
        own = ("--backend", BACKEND, "--engines", self.store.root, *options)
        return status_of(engines.main, "build", *own, "--", *self.words(*more))

    def generate(self, out, *more):
        own = ("--out", out, "--count", 12, "--shard-size", 6, "--engines", self.store.root)
        return status_of(generate.main, *own, *self.words(*more))

    def keys(self):
        return {manifest.spec.network: manifest.key for manifest in self.store.list()}

    def measured(self, **times):
        for network, (engine, eager) in times.items():
            set_facts(self.store, self.keys()[network], milliseconds=milliseconds(engine, eager))


@pytest.fixture(scope="module", autouse=True)
def unchanged():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, BACKEND, Unchanged(BACKEND))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("engines")
    prior = make_tiny_sd(
        base / "prior", vae_class=AutoencoderTiny, unet=UNET, vae=VAE, text_encoder={"num_hidden_layers": 1}
    )
    found = Place(prior=prior, teacher=make_teacher(base / "teacher"), store=EngineStore(base / "store"))
    assert found.build() == 0
    return found


@pytest.fixture
def own(place, tmp_path):
    """The place with a store to be changed."""
    root = shutil.copytree(place.store.root, tmp_path / "store")
    return Place(prior=place.prior, teacher=place.teacher, store=EngineStore(root))


@pytest.fixture(scope="module")
def eager(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("eager") / "out"
    assert place.generate(out, "--backend", "eager") == 0
    return out


def largest_difference(a: Path, b: Path) -> int:
    return int((read_folder(a).images.int() - read_folder(b).images.int()).abs().max())


def recorded(out: Path) -> dict[str, str]:
    """The engines that a folder was begun with."""
    return json.loads((out / "manifest.json").read_text())["run"]["engines"]


def test_images_by_engines_are_those_of_eager_networks(place, eager, tmp_path, capsys):
    assert place.generate(tmp_path / "out", "--backend", BACKEND) == 0
    said = capsys.readouterr()
    result = last_line(said.out)
    assert result["backends"] == {name: {"backend": BACKEND, "why": f"--backend {BACKEND}"} for name in NETWORKS}
    assert f"unet, decode, gradient: {BACKEND} (--backend {BACKEND})" in said.err
    assert largest_difference(eager, tmp_path / "out") <= 2
    ours, theirs = read_folder(tmp_path / "out"), read_folder(eager)
    assert torch.equal(ours.labels, theirs.labels) and ours.images.float().std(0).mean() > 2
    assert recorded(tmp_path / "out") == place.keys() and recorded(eager) == {}


def test_a_group_in_several_calls_takes_the_split_form(own, eager, tmp_path, capsys):
    cut = ("--batch", 4)
    assert own.generate(tmp_path / "out", *cut, "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "for image_moments, image_gradient, decode_vjp" in error and "--batch 4" in error
    assert own.build(*cut) == 0
    assert own.generate(tmp_path / "out", *cut, "--backend", BACKEND) == 0
    assert recorded(tmp_path / "out").keys() == {"unet", "decode", "image_moments", "image_gradient", "decode_vjp"}
    assert largest_difference(eager, tmp_path / "out") <= 2


def test_auto_goes_on_with_what_it_chose(own, tmp_path, capsys):
    own.measured(unet=(1.0, 2.0), decode=(2.0, 1.0), gradient=(1.0, 2.0))
    out = tmp_path / "out"
    assert own.generate(out) == 0
    backends = {name: use["backend"] for name, use in last_line(capsys.readouterr().out)["backends"].items()}
    assert backends == {"unet": BACKEND, "decode": "eager", "gradient": BACKEND}
    before = shards_of(out)
    # other measurements later: the folder is finished as it was begun
    own.measured(unet=(2.0, 1.0), decode=(1.0, 2.0), gradient=(2.0, 1.0))
    next(out.glob("shard-*.tar")).unlink()
    assert own.generate(out) == 0
    assert "the folder was begun with it" in capsys.readouterr().err and shards_of(out) == before
    # and not at all once they are gone
    own.store.prune({own.keys()["decode"]})
    next(out.glob("shard-*.tar")).unlink()
    assert own.generate(out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "this folder cannot be continued: its unet was begun with the engine" in error and "dfkd-engines" in error


@pytest.mark.parametrize("batch", [4, 200])
def test_a_folder_is_continued_with_its_engines_whatever_the_batch(place, tmp_path, batch):
    """4 alone would cut the groups of six; 200 would be another engine's."""
    out, words = tmp_path / "out", ("--backend", BACKEND)
    assert place.generate(out, *words) == 0
    before = shards_of(out)
    next(out.glob("shard-*.tar")).unlink()
    assert place.generate(out, *words, "--batch", batch) == 0
    assert shards_of(out) == before and recorded(out) == place.keys()


def test_a_folder_of_eager_networks_stays_so(own, eager, tmp_path, capsys):
    """Engines that were built in between do not get into it, by `auto`; by name they are refused."""
    own.measured(unet=(1.0, 2.0), decode=(1.0, 2.0), gradient=(1.0, 2.0))
    out = shutil.copytree(eager, tmp_path / "out")
    next(out.glob("shard-*.tar")).unlink()
    assert own.generate(out) == 0
    assert shards_of(out) == shards_of(eager) and recorded(out) == {}
    next(out.glob("shard-*.tar")).unlink()
    capsys.readouterr()
    assert own.generate(out, "--backend", BACKEND) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "this folder cannot be continued: its unet was begun without engines" in error


def test_without_engines_a_named_backend_is_refused_with_the_command(place, tmp_path, capsys):
    empty = ("--engines", tmp_path / "none", "--backend", BACKEND)
    assert place.generate(tmp_path / "out", *empty) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"there is no {BACKEND} engine in {tmp_path / 'none'} for unet, decode, gradient" in error
    assert f"dfkd-engines build --backend {BACKEND} --engines {tmp_path / 'none'} -- " in error
    assert place.generate(tmp_path / "out", *empty, "--gradient", "unet") == 2
    assert f"--backend {BACKEND} cannot be used" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("shard-*"))


def test_what_changes_an_engine_changes_its_key_by_itself(place, tmp_path, capsys):
    def differing(*more, prior=None):
        words = ("--backend", BACKEND, "--engines", place.store.root, "--", *place.words(*more))
        assert status_of(engines.main, "explain", *words, *(("--prior", prior) if prior else ())) == 0
        found = last_line(capsys.readouterr().out)["differences"]
        return {name.split()[0]: [field for field, *_ in fields] for name, fields in found.items() if fields}

    assert differing() == {} == differing("--seed", 3, "--cutmix-every", 1, "--batch", 8)
    assert differing("--cls-weight", 0.5) == {"gradient": ["config.losses"]}
    prior = shutil.copytree(place.prior, tmp_path / "prior")
    file = prior / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_shift": 0.25}))  # decoding does not read it
    assert differing(prior=prior) == {"decode": ["components.vae"], "gradient": ["components.vae"]}
    (tmp_path / "own.py").write_text(LOSS)
    assert "config.losses" in differing("--loss", f"{tmp_path / 'own.py'}:Brightness(weight=0.1)")["gradient"]


def test_a_unet_in_eight_bits_from_build_to_images(own, eager, tmp_path, capsys):
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra quantise)")
    narrow = ("--quantise", "int8")
    assert own.generate(tmp_path / "out", *narrow) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "for unet int8: unet: it was not built with this --quantise yet" in error
    wide = own.keys()["unet"]
    assert own.build(*narrow, options=("--only", "unet")) == 0
    assert own.generate(tmp_path / "out", *narrow) == 0
    assert recorded(tmp_path / "out")["unet"] != wide
    assert own.generate(tmp_path / "out", *narrow) == 0  # again: nothing to do, and nothing against it
    assert own.generate(tmp_path / "out") == 2  # not with another UNet
    assert "cannot be continued" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out")[0].class_names == CLASS_NAMES
