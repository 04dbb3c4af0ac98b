"""A prior and a teacher whose engines are traced and compiled in seconds: a few dozen operations each."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn

from dfkd.cli import engines
from dfkd.cli.generate_options import GenerateOptions
from dfkd.cli.options import parse
from dfkd.compiled.digests import FileDigests
from dfkd.compiled.requests import DIGESTS, Request, requests
from dfkd.presets import PRESETS
from dfkd.teachers import Classifier, build, checkpoint
from dfkd_engine.backends import get
from dfkd_engine.spec import cpu_architecture
from dfkd_engine.storage.manifest import MANIFEST
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import status_of
from tests.tiny_sd import make_tiny_sd

BACKEND = "onnxruntime"  # compiles in seconds, where inductor takes half a minute
NEEDS_IT = pytest.mark.skipif(get(BACKEND).unusable("cpu") is not None, reason=str(get(BACKEND).unusable("cpu")))
CLASS_NAMES = ("zero", "one", "two")
GROUP = 6
TEACHER = f"file:{Path(__file__)}:teacher_network"

UNET = {
    "block_out_channels": (4,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "sample_size": 4,
}
VAE = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
VAE |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}


def teacher_network(num_classes: int) -> nn.Module:
    """Two BatchNorm layers, smooth; images of 8x8."""
    first = (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.SiLU())
    second = (nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes))


def make_prior(folder: Path, seed: int = 0) -> Path:
    """4x4 latents, 8x8 images."""
    text = {"num_hidden_layers": 1}
    return make_tiny_sd(folder, seed=seed, vae_class=AutoencoderTiny, unet=UNET, vae=VAE, text_encoder=text)


def make_teacher(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(TEACHER, len(CLASS_NAMES))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(torch.randn(layer.num_features) / 3)
                layer.running_var.copy_(torch.rand(layer.num_features) + 0.2)
    module.eval()
    checkpoint.save(folder, Classifier(module, TEACHER, CLASS_NAMES, 8, (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)))
    return folder


def nudge(file: Path) -> None:
    """Change one weight of a safetensors file."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})


def words(prior: Path, teacher: Path | None, *more: object) -> list[str]:
    """The options of dfkd-generate that both programs take."""
    given = ["--prior", prior, *(["--teacher-checkpoint", teacher] if teacher else [])]
    given += ["--device", "cpu", "--group", GROUP, "--steps", 2, *more]
    return [str(word) for word in given]


def options_of(prior: Path, teacher: Path | None, *more: object) -> GenerateOptions:
    return parse(GenerateOptions, ["--out", ".", *words(prior, teacher, *more)], "dfkd-generate", PRESETS)


def recipes(options: GenerateOptions, backend: str, root: Path) -> dict[str, Request]:
    """network -> request."""
    found = requests(options, backend, cpu_architecture(), FileDigests(root / DIGESTS))
    return {request.network: request for request in found}


class Place(NamedTuple):
    """prior, teacher: folders. store: of BACKEND's engines for a guided run with `words`, built once a session."""

    prior: Path
    teacher: Path
    store: Path

    def words(self, *more: object) -> list[str]:
        return words(self.prior, self.teacher, *more)


@cache
def folders(base: Path) -> tuple[Path, Path]:
    return make_prior(base / "prior"), make_teacher(base / "teacher")


@cache
def built(base: Path) -> Place:
    place = Place(*folders(base), base / "store")
    assert status_of(engines.main, "build", "--backend", BACKEND, "--engines", place.store, "--", *place.words()) == 0
    return place


def with_own_store(place: Place, folder: Path) -> Place:
    """The same with a copy of the store, to be changed."""
    return place._replace(store=shutil.copytree(place.store, folder / "store"))


def key_of(store: Path, network: str) -> str:
    (key,) = (manifest.key for manifest in EngineStore(store).list() if manifest.spec.network == network)
    return key


def set_facts(store: Path, network: str, **facts: Any) -> None:
    """Write other facts into an engine's manifest, as if they had been measured."""
    manifest = EngineStore(store).get(key_of(store, network))
    assert manifest is not None
    changed = replace(manifest, facts={**manifest.facts, **facts})
    (store / manifest.key / MANIFEST).write_text(changed.to_text())


def measured(engine: float, eager: float) -> Mapping[str, float]:
    return {"engine": engine, "eager": eager, "rows": 6, "threads": 1}


def flip_a_byte(store: Path, network: str) -> None:
    file = next(path for path in sorted((store / key_of(store, network) / "payload").rglob("*")) if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
