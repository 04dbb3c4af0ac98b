"""Priors loaded from a folder: equal to diffusers' own pipeline, frozen, differentiable, and refused when unfit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import dfkd_engine.files
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.prior import EMBEDDED, Prior, check_source
from tests.tiny_sd import VAE, WIDTH, make_tiny_sd


@pytest.fixture(scope="module")
def pipeline(prior_folder):
    pipe = StableDiffusionPipeline.from_pretrained(prior_folder, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval()
    return pipe


@pytest.fixture
def spoilt(prior_folder, tmp_path):
    """A copy of the prior to break."""
    return Path(shutil.copytree(prior_folder, tmp_path / "sd"))


def edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def test_description(prior, prior_folder):
    assert prior.latent_channels == 4 and prior.latent_size == (64, 64)
    assert prior.vae_scale_factor == 8 and prior.scaling_factor == 0.18215
    assert prior.prediction_type == "epsilon" and prior.source == str(prior_folder)
    assert prior.scheduler_config["_class_name"] == "PNDMScheduler" and prior.scheduler_config["steps_offset"] == 1
    assert prior.dtype == torch.float32 and prior.device.type == "cpu"
    for network in prior.networks.values():
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_prompts_equal_the_pipeline_and_are_encoded_once(prior_folder, pipeline, monkeypatch):
    prior, calls = Prior.from_pretrained(prior_folder), []
    network = prior.networks["text_encoder"]
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a, **k: (calls.append(a), forward(*a, **k))[1])
    prompts = ["a photo of 7", "", "an " * 200, "a photo of 7"]  # repeated, empty, longer than the 77 positions
    (got,) = prior.conditions(prompts)
    assert got.shape == (4, 77, WIDTH) and torch.equal(got[0], got[3])
    for embedding, prompt in zip(got, prompts, strict=True):
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(embedding, expected[0])
    prior.unconditional()
    assert len(calls) == 2  # the empty prompt is tried as it is loaded


@pytest.mark.parametrize("t", [501, torch.tensor(501.0, dtype=torch.float64), torch.full((2,), 501)])
def test_denoise_is_the_unet(prior, pipeline, t):
    # A seed, since this thin UNet's norms take groups of two numbers: where those are nearly equal, rounding decides.
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, WIDTH, generator=generator)
    with torch.no_grad():
        expected = pipeline.unet(z, 501, encoder_hidden_states=context).sample
        # the pipeline's networks are NCHW, ours NHWC: the same sums in another order
        torch.testing.assert_close(prior.denoise(z, t, context), expected, rtol=1e-4, atol=1e-4)


def test_decode_is_the_vae_in_0_1(prior, pipeline):
    z = torch.randn(2, 4, 4, 5)
    with torch.no_grad():
        raw = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
        image = prior.decode(z)
    assert image.shape == (2, 3, 32, 40)
    torch.testing.assert_close(image, pipeline.image_processor.postprocess(raw, "pt"))


def test_decode_is_differentiable_and_doubled_is_float64(prior):
    z = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    wide = prior.doubled()
    assert wide.dtype == torch.float64 and prior.dtype == torch.float32
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(wide.decode(leaf).sum(), leaf)
    with torch.no_grad():
        numeric = (wide.decode(z + 1e-6 * slope).sum() - wide.decode(z - 1e-6 * slope).sum()) / 2e-6
    # central difference along the gradient: error O(1e-12) plus 1e-16 / 1e-6 of rounding
    torch.testing.assert_close(numeric, slope.square().sum(), rtol=1e-5, atol=1e-8)


def test_half_precision_networks_keep_the_callers_dtype(prior_folder):
    prior = Prior.from_pretrained(prior_folder, dtype="bf16")
    z, (context,) = torch.randn(1, 4, 8, 8), prior.conditions(["a"])
    assert context.dtype == torch.bfloat16 and prior.to("cpu") is prior
    assert prior.denoise(z, 10, context).dtype == torch.float32 and prior.decode(z).dtype == torch.float32
    with pytest.raises(EngineError, match="the dtype 'fp8' is unknown"):
        Prior.from_pretrained(prior_folder, dtype="fp8")


def test_prompt_and_labels_of_the_folder(prior, spoilt):
    assert (prior.prompt, prior.labels) == ("a photo of a {label}", ())
    (spoilt / "dfkd.json").write_text('{"prompt": "the {label}", "labels": ["a", "b"]}')
    found = Prior.from_pretrained(spoilt)
    assert (found.prompt, found.labels) == ("the {label}", ("a", "b"))
    for content in ('{"prompt": 3}', "[]", '{"labels": 1}', "{"):
        (spoilt / "dfkd.json").write_text(content)
        with pytest.raises(EngineError, match=r"dfkd\.json: (prompt is 3: it|labels is 1: they|not JSON of an object)"):
            Prior.from_pretrained(spoilt)


def test_shift_factor(prior):
    vae = AutoencoderKL(**VAE | {"shift_factor": 0.3}).eval()
    z = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        expected = (vae.decode(z / 0.5 + 0.3).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(replace(prior, vae=vae, scaling_factor=0.5, shift_factor=0.3).decode(z), expected)


def test_autoencoder_tiny_v_prediction_and_a_name(tmp_path, monkeypatch):
    folder = make_tiny_sd(tmp_path, vae_class=AutoencoderTiny, scheduler={"prediction_type": "v_prediction"})
    monkeypatch.setitem(EMBEDDED, "mine", folder)
    made = Prior.from_pretrained("mine")
    assert made.prediction_type == "v_prediction" and made.scaling_factor == 1.0 and made.vae_scale_factor == 8
    assert made.source == "mine"
    z = torch.randn(1, 4, 2, 3)
    torch.testing.assert_close(made.decode(z), (made.vae.decode(z).sample / 2 + 0.5).clamp(0, 1))


def change_weights(folder):
    weights = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, folder / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "part, change",
    [
        ("vae", change_weights),
        ("unet", lambda folder: edit(folder / "unet/config.json", flip_sin_to_cos=False)),
        ("text_encoder", lambda folder: edit(folder / "text_encoder/config.json", hidden_act="gelu")),
        ("tokenizer", lambda folder: (folder / "tokenizer/merges.txt").open("a").write("t h\n")),
        ("scheduler", lambda folder: edit(folder / "scheduler/scheduler_config.json", beta_end=0.02)),
    ],
)
def test_the_digest_of_a_component_follows_its_files(prior, spoilt, part, change):
    assert PriorFolder.read(spoilt).digests() == prior.digests  # not the path
    change(spoilt)
    found = PriorFolder.read(spoilt).digests()
    assert {name for name in found if found[name] != prior.digests[name]} == {part}


def test_weights_are_hashed_once_a_process(prior_folder, prior, monkeypatch):
    monkeypatch.setattr(dfkd_engine.files, "sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert PriorFolder.read(prior_folder).digests() == prior.digests


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_missing_part(spoilt, part):
    check_source(spoilt)
    shutil.rmtree(spoilt / part)
    for load in (Prior.from_pretrained, check_source):
        with pytest.raises(EngineError, match=f"{part}/.*(Fetch| is missing)"):
            load(spoilt)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("unet", {"_class_name": "UNet3DConditionModel"}, "unet is a UNet3DConditionModel: known are .*UNet2DCond"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64: its text encoder makes embeddings of width"),
        ("unet", {"in_channels": 9}, "unet takes 9 and gives 4 channels: the VAE's latents have 4"),
        ("unet", {"addition_embed_type": "text"}, "unet has addition_embed_type = text"),
        ("vae", {"_class_name": "VQModel"}, "vae is a VQModel: want one of AutoencoderKL, AutoencoderTiny"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "text_encoder is a T5EncoderModel: want a CLIPText"),
    ],
)
def test_unfit_configs(spoilt, part, change, message):
    edit(spoilt / part / "config.json", **change)
    with pytest.raises(EngineError, match=message):
        Prior.from_pretrained(spoilt)


def no_json(folder):
    (folder / "unet/config.json").write_text("{")


def no_object(folder):
    (folder / "scheduler/scheduler_config.json").write_text("[1]")


def damaged_tokenizer(folder):
    (folder / "tokenizer/tokenizer.json").write_text('{"model": 3}')


def pickled(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def incomplete(folder):
    path = folder / "text_encoder/model.safetensors"
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path, metadata={"format": "pt"})


def truncated(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (no_json, "not JSON"),
        (no_object, "not JSON of an object"),
        (damaged_tokenizer, "tokenizer: could not be loaded"),
        (pickled, r"weights only in diffusion_pytorch_model.bin, a pickled file.* python -c .from diffusers import"),
        (incomplete, "1 weights are not in its files"),
        (truncated, r"unet/diffusion_pytorch_model.safetensors: it is damaged, or only a part of it was fetched"),
    ],
)
def test_files_that_cannot_be_loaded(spoilt, spoil, message):
    spoil(spoilt)
    with pytest.raises(EngineError, match=message):
        Prior.from_pretrained(spoilt)


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "nothing", Path("no/such")])
def test_absent_folder(source):
    with pytest.raises(EngineError, match="no such folder or file, and a hub id has the form owner/name"):
        check_source(source)


def test_hub_id_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EngineError, match=r"not in the local cache, and nothing may be fetched .*Fetch it once"):
        Prior.from_pretrained("owner/name")
    check_source("owner/name")  # which is not fetched
