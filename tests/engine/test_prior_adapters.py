"""LoRA weights and tokens of textual inversion: as diffusers' own pipeline has them, in the digests, or refused."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from dfkd_engine.errors import EngineError
from dfkd_engine.priors.prior import Prior, check_source
from tests.adapter_files import save_lora, save_token
from tests.tiny_priors import SIZE, WIDTH

PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}


@pytest.mark.parametrize("name, part", [("sd1", "unet"), ("sdxl", "unet"), ("sd3", "transformer")])
def test_fused_weights_are_those_of_diffusers_pipeline(name, part, tiny_prior, tmp_path):
    folder, kind = tiny_prior(name), PIPELINES[name]
    lora = save_lora(tmp_path, folder, kind, part)
    prior, plain = Prior.from_pretrained(folder, lora=[f"{lora}:0.7"]), Prior.from_pretrained(folder)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    theirs = kind.from_pretrained(folder, **absent)
    theirs.load_lora_weights(lora, adapter_name="own")
    theirs.set_adapters(["own"], adapter_weights=[0.7])
    expected = Prior.from_pretrained(folder).family.predict  # the same call, on their networks
    z, t = torch.randn(2, 4, SIZE, SIZE), torch.tensor([500.0])
    given = plain.conditions(["zero", "one"])
    with torch.no_grad():
        got, want = prior.denoise(z, t, *given), expected(getattr(theirs, part), z, t, *given)
        # W + s B A in one product or in two: rounding of the layers
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (got - plain.denoise(z, t, *given)).abs().max() > 1e-2
        embeds = theirs.encode_prompt(
            prompt="zero",
            device="cpu",
            do_classifier_free_guidance=False,
            num_images_per_prompt=1,
            **({"prompt_2": None, "prompt_3": None} if name == "sd3" else {}),
        )
        torch.testing.assert_close(prior.conditions(["zero"])[0], embeds[0], rtol=1e-4, atol=1e-4)
        assert (prior.conditions(["zero"])[0] - plain.conditions(["zero"])[0]).abs().max() > 1e-2
    changed = {key for key in prior.digests if prior.digests[key] != plain.digests.get(key)}
    assert changed == {part, "text_encoder", "lora"}
    assert not any("lora" in key for network in prior.networks.values() for key in network.state_dict())


def test_another_trainers_names_are_the_same_weights(tiny_prior, tmp_path):
    """As kohya's scripts write them: flat names, and alpha beside each pair; scale alpha / rank is 1 at alpha 2."""
    folder = tiny_prior("sd1")
    lora = save_lora(tmp_path, folder, StableDiffusionPipeline, text=False)
    renamed = {}
    for key, value in load_file(lora / "pytorch_lora_weights.safetensors").items():
        layer, _, half = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora_")
        flat = "lora_unet_" + layer.replace(".", "_")
        renamed[f"{flat}.lora_{'down' if half == 'A' else 'up'}.weight"] = value
        renamed[f"{flat}.alpha"] = torch.tensor(2.0)
    save_file(renamed, tmp_path / "kohya.safetensors")
    ours = Prior.from_pretrained(folder, lora=[f"{lora / 'pytorch_lora_weights.safetensors'}"])
    theirs = Prior.from_pretrained(folder, lora=[f"{tmp_path / 'kohya.safetensors'}"])
    for (name, weight), other in zip(ours.denoiser.named_parameters(), theirs.denoiser.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)
    save_file(renamed | {"lora_unet_any.dora_scale": torch.ones(2)}, tmp_path / "dora.safetensors")
    with pytest.raises(EngineError, match="of DoRA, whose scales diffusers' loader leaves out"):
        Prior.from_pretrained(folder, lora=[f"{tmp_path / 'dora.safetensors'}"])


def test_digests_follow_file_scale_and_order(tiny_prior, tmp_path):
    folder = tiny_prior("sd1")
    lora = save_lora(tmp_path, folder, StableDiffusionPipeline, text=False)
    given = [(), (f"{lora}",), (f"{lora}:0.5",), (f"{lora}", f"{lora}:0.5"), (f"{lora}:0.5", f"{lora}")]
    priors = [Prior.from_pretrained(folder, lora=texts) for texts in given]
    assert len({prior.digests["unet"] for prior in priors}) == len(given)
    assert len({prior.digests["text_encoder"] for prior in priors}) == 1  # which no weight of the file is for
    again = Prior.from_pretrained(folder, lora=[f"{lora / 'pytorch_lora_weights.safetensors'}"])
    assert again.digests == priors[1].digests  # a folder or its file


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_is_that_of_diffusers_pipeline(rows, tiny_prior, tmp_path):
    folder, file = tiny_prior("sd1"), save_token(tmp_path / "toy.safetensors", rows=rows)
    prior, plain = Prior.from_pretrained(folder, textual_inversion=[str(file)]), Prior.from_pretrained(folder)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.load_textual_inversion(str(file))
    for prompt in ("a photo of a <toy>", "a photo"):
        expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
        torch.testing.assert_close(prior.conditions([prompt])[0], expected)
    torch.testing.assert_close(prior.conditions(["a photo"])[0], plain.conditions(["a photo"])[0])
    assert prior.tokens == ("<toy>",) and plain.tokens == ()
    changed = {key for key in prior.digests if prior.digests[key] != plain.digests.get(key)}
    assert changed == {"text_encoder", "tokenizer", "textual_inversion"}
    assert len(prior.family.text.tokens("<toy>")) == rows + 2


def test_a_token_of_two_text_encoders(tiny_prior, tmp_path):
    folder, file = tiny_prior("sdxl"), tmp_path / "toy.safetensors"
    state = {"clip_l": torch.randn(2, WIDTH), "clip_g": torch.randn(2, WIDTH)}
    save_file(state, file)
    prior = Prior.from_pretrained(folder, textual_inversion=[f"{file}:<toy>"])
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    for entry, ending in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(theirs, f"{part}{ending}") for part in ("text_encoder", "tokenizer")}
        theirs.load_textual_inversion({"emb_params": state[entry]}, token="<toy>", **parts)
    context, _, pooled, _ = theirs.encode_prompt("a <toy>", device="cpu", do_classifier_free_guidance=False)
    got = prior.conditions(["a <toy>"])
    torch.testing.assert_close(got[0], context)
    torch.testing.assert_close(got[1], pooled)


def test_what_is_refused(tiny_prior, tmp_path):
    folder = tiny_prior("sd1")
    lora = save_lora(tmp_path / "lora", folder, StableDiffusionPipeline) / "pytorch_lora_weights.safetensors"
    token = save_token(tmp_path / "toy.safetensors")
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, plain)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(lora.read_bytes()[:100])
    pickled = tmp_path / "weights.bin"
    pickled.write_bytes(b"")
    early = {  # before any network is loaded
        f"{tmp_path}/none.safetensors": "no such file or folder",
        f"{lora}:strong": "its scale 'strong' is no number",
        f"{lora}:nan": "its scale 'nan' is no number",
        str(tmp_path): "the folder holds 3 safetensors files",
        str(damaged): "damaged",
        str(pickled): "safetensors only, which a .bin is not",
    }
    for text, message in early.items():
        with pytest.raises(EngineError, match=message):
            check_source(folder, lora=[text])
        with pytest.raises(EngineError, match=message):
            Prior.from_pretrained(folder, lora=[text])
    for name, text, message in (
        ("sd1", str(plain), "LoRA .*plain"),
        ("sdxl", str(lora), "LoRA .*trained for this prior's networks"),
        ("dit", str(lora), "cannot be added to DiT"),
        ("pixels", str(lora), "cannot be added to UNet of pixels"),
    ):
        with pytest.raises(EngineError, match=message):
            Prior.from_pretrained(tiny_prior(name), lora=[text])
    narrow = save_token(tmp_path / "narrow.safetensors", width=7)
    two = save_token(tmp_path / "two.safetensors", other=torch.zeros(WIDTH))
    for name, texts, message in (
        ("sd1", [str(narrow)], "narrow.*incorrect shape"),
        ("sd1", [str(two)], "it holds <toy>, other, and this prior takes one embedding"),
        ("sd1", [str(token), str(token)], "already"),
        ("sdxl", [str(token)], "it holds <toy>, and this prior takes clip_l and clip_g"),
        ("sd3", [str(token)], "tokens of textual inversion cannot be added"),
        ("dit", [str(token)], "cannot be added to DiT"),
    ):
        with pytest.raises(EngineError, match=message):
            Prior.from_pretrained(tiny_prior(name), textual_inversion=texts)
