"""Checkpoints in one file: the prior of one is the prior of the pipeline that it was written from."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.prior import Prior, check_source
from tests.single_file import write_single_file
from tests.synthesis.small_sd import UNET, VAE, make_small_sd
from tests.tiny_sd import make_tiny_sd


def bare(folder, made):
    """The configs and the tokenizer of a pipeline, without weights."""
    return shutil.copytree(folder, made, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A pipeline, its single file, and its configs alone: of Stable Diffusion 1."""
    root = tmp_path_factory.mktemp("single")
    folder = make_small_sd(root / "pipeline")
    return (
        folder,
        write_single_file(DiffusionPipeline.from_pretrained(folder), root / "model.safetensors"),
        bare(folder, root / "configs"),
    )


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The same of Stable Diffusion 2: a text encoder of open_clip's layout, 1024 wide."""
    root = tmp_path_factory.mktemp("second")
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "hidden_act": "gelu"}
    unet = UNET | {"cross_attention_dim": 1024, "layers_per_block": 2, "use_linear_projection": True}
    scheduler = {"prediction_type": "v_prediction"}
    folder = make_tiny_sd(root / "pipeline", unet=unet, vae=VAE, text_encoder=wide, scheduler=scheduler)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    return folder, write_single_file(pipeline, root / "v2.safetensors", open_clip=True), bare(folder, root / "configs")


@pytest.mark.parametrize("which", ["places", "second"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_is_the_pipeline_it_was_written_from(which, dtype, request):
    folder, file, configs = request.getfixturevalue(which)
    check_source(file, config=str(configs))
    ours, theirs = Prior.from_pretrained(file, dtype, config=str(configs)), Prior.from_pretrained(folder, dtype)
    assert ours.prediction_type == theirs.prediction_type and ours.dtype == theirs.dtype
    for part, network in theirs.networks.items():
        own, other = ours.networks[part].state_dict(), network.state_dict()
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert torch.equal(ours.conditions(["a cat"])[0], theirs.conditions(["a cat"])[0])


def test_its_digests_are_of_file_and_configs(places, tmp_path):
    _, file, configs = places
    before = Prior.from_pretrained(file, config=str(configs)).digests
    moved, other = shutil.copy(file, tmp_path / "moved.safetensors"), shutil.copytree(configs, tmp_path / "configs")
    assert Prior.from_pretrained(moved, config=str(other)).digests == before
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    found = Prior.from_pretrained(moved, config=str(other))
    assert {part for part in before if before[part] != found.digests[part]} == {"vae"} and found.scaling_factor == 0.5
    weights = load_file(moved)
    weights["model.diffusion_model.out.2.bias"] += 1
    save_file(weights, moved)
    found = Prior.from_pretrained(moved, config=str(configs))
    assert {part for part in before if before[part] != found.digests[part]} == {"unet", "vae", "text_encoder"}


def refusal(file, **options):
    with pytest.raises(EngineError) as caught:
        check_source(file, **options)
        Prior.from_pretrained(file, **options)
    return str(caught.value)


def test_without_configs_they_are_asked_of_the_hub_and_else_by_name(places, second, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match="its configs, tokenizer and schedule are those of stable-diffusion-v1-5/"):
        text = refusal(places[1])
    assert "its configs: prior stable-diffusion-v1-5/stable-diffusion-v1-5: it is not in the local cache" in text
    assert "Give --prior-config, a folder or hub id" in text
    assert "does not say whether it predicts noise or velocities" in refusal(second[1])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(places[2]))
    with pytest.warns(UserWarning, match="are those of stable-diffusion-v1-5/"):
        assert Prior.from_pretrained(places[1]).latent_size == (8, 8)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("unet", {"layers_per_block": 2}, "its unet, with the config of"),
        ("unet", {"block_out_channels": [16, 16]}, "its unet, with the config of .*cannot be loaded .*shape"),
        ("vae", {"layers_per_block": 2}, "its vae, with the config of .*weights are not in the file"),
        ("text_encoder", {"num_hidden_layers": 2}, "its text_encoder, .* weights are not in the file"),
        ("unet", {"act_fn": 3}, r"unet/config\.json: act_fn is 3"),
    ],
)
def test_configs_of_another_network(places, tmp_path, part, changes, message):
    other = shutil.copytree(places[2], tmp_path / "configs")
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(EngineError, match=message):
        Prior.from_pretrained(places[1], config=str(other))


def test_weights_beyond_the_configs_are_refused(places, tmp_path):
    _, file, configs = places
    other = tmp_path / "more.safetensors"
    save_file(load_file(file) | {"model.diffusion_model.extra.weight": torch.ones(2)}, other)
    assert "weights for it, the network" in refusal(other, config=str(configs))


def test_files_that_are_none(places, tmp_path):
    _, file, configs = places
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, pickled)
    assert "StableDiffusionPipeline.from_single_file(" in (text := refusal(pickled)) and "can run code" in text
    half = tmp_path / "half.safetensors"
    half.write_bytes(file.read_bytes()[:2000])
    assert "damaged, or only a part of it was fetched" in refusal(half)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.weight": torch.ones(2)}, lora)
    assert "it has no model.diffusion_model.*, its first weight is lora_unet_down.weight" in refusal(lora)
    xl = tmp_path / "xl.safetensors"
    name = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({name: torch.ones(2)}, xl)
    assert "StableDiffusionXLPipeline.from_single_file(" in refusal(xl)
    assert "variant 'fp16': " in refusal(file, variant="fp16", config=str(configs))
    assert "no such folder or file" in refusal(tmp_path / "absent.safetensors")
    assert "revision 'v1'" in refusal(file, revision="v1")
