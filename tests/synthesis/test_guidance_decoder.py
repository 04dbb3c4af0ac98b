"""A decoder of guidance's own: the gradient goes through it and nothing else does, by autograd and by engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from dfkd.compiled.choose import Choice
from dfkd.compiled.engines import engine_spec
from dfkd.errors import SettingError, UsageError
from dfkd.synthesis.diffusers_guidance import TeacherGuidance
from dfkd.synthesis.sampler import unit_rms
from dfkd.training.decoder import save_decoder
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.guidance_decoder import Decoder, check_decoder
from tests.synthesis.small_networks import CHANNELS, SIDE, SmallPrior, classifier, pipeline
from tests.synthesis.test_functions import Recorder

SEED = 11


def tiny(seed: int = 0, channels: int = CHANNELS, levels: int = 2, **changes: Any) -> AutoencoderTiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            **changes,
        )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    save_decoder(tiny(scaling_factor=0.5), folder, torch.float32)
    return folder


def test_the_gradient_goes_through_it_and_the_image_does_not(decoder: Path) -> None:
    own = Decoder.from_pretrained(decoder)
    pipe, plain = pipeline(guidance_decoder=str(decoder)), pipeline()
    z = torch.randn(7, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(7) % 3
    got, losses = pipe.guidance.gradient(z, labels, 7)
    want, others = plain.guidance.with_(own).gradient(z, labels, 7)
    assert torch.equal(got, want) and all(torch.equal(losses[name], others[name]) for name in losses)
    assert not torch.allclose(got, plain.guidance.gradient(z, labels, 7)[0])
    assert torch.equal(pipe.decode(z), plain.decode(z))
    assert pipe.identity() == plain.identity() | {"guidance_decoder_digest": own.digest}
    assert not torch.equal(pipe(range(7), seed=SEED).images, plain(range(7), seed=SEED).images)


def test_it_decodes_by_its_own_scale(decoder: Path) -> None:
    own = Decoder.from_pretrained(decoder)
    z = torch.randn(2, CHANNELS, SIDE, SIDE)
    network = AutoencoderTiny.from_pretrained(decoder, low_cpu_mem_usage=False)  # which invents an encoder
    with torch.no_grad():
        wanted = (network.decode(z / 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(own(z), wanted)
    torch.testing.assert_close(own.doubled()(z.double()).float(), wanted, rtol=1e-4, atol=1e-5)


def test_a_vae_with_its_encoder_in_a_pipelines_folder_will_do(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        scaling_factor=0.25,
    )
    vae.save_pretrained(tmp_path / "vae")
    z = torch.randn(1, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        wanted = (vae.decode(z / 0.25).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(Decoder.from_pretrained(tmp_path)(z), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "called"),
    [
        ({}, ("unet", "decode", "gradient")),
        ({"batch": 3}, ("unet", "decode", "guidance_decode", "image_moments", "image_gradient", "decode_vjp")),
        ({"adv_weight": 1.0}, ("unet", "decode", "guidance_decode", "decode_vjp")),
    ],
)
def test_engines_stand_in_for_its_functions(
    monkeypatch: pytest.MonkeyPatch, decoder: Path, own: dict[str, Any], called: tuple[str, ...]
) -> None:
    student = classifier(seed=9) if "adv_weight" in own else None
    pipe = pipeline(student=student, guidance_decoder=str(decoder), **own)
    assert tuple(function.name for function in pipe.functions()) == called
    images = pipe(range(7), seed=SEED).images
    engines = Recorder(pipe.functions())
    chosen = tuple(Choice(name, "recorder", f"key of {name}", "for the test") for name in engines)
    monkeypatch.setattr("dfkd.synthesis.pipeline.choose", lambda *_: chosen)
    monkeypatch.setattr("dfkd.synthesis.pipeline.load_engines", lambda *_: engines)
    pipe.use_engines({})
    found = pipe(range(7), seed=SEED).images
    assert (found.int() - images.int()).abs().max() <= 1  # the split form rounds otherwise
    assert engines.called == set(called)


def test_an_engine_of_the_prior_alone_leaves_the_gradient_to_it(monkeypatch: pytest.MonkeyPatch, decoder: Path) -> None:
    """The decode engine is the VAE's: in the split form guidance must not look through it."""
    pipe = pipeline(guidance_decoder=str(decoder), batch=3)
    images = pipe(range(7), seed=SEED).images
    engines = Recorder([function for function in pipe.functions() if function.name != "guidance_decode"])
    chosen = tuple(Choice(name, "recorder", f"key of {name}", "for the test") for name in engines)
    monkeypatch.setattr("dfkd.synthesis.pipeline.choose", lambda *_: chosen)
    monkeypatch.setattr("dfkd.synthesis.pipeline.load_engines", lambda *_: engines)
    pipe.use_engines({})
    assert (pipe(range(7), seed=SEED).images.int() - images.int()).abs().max() <= 1


def test_float64_judges_the_same_functions(decoder: Path) -> None:
    for function in pipeline(guidance_decoder=str(decoder), batch=3).functions():
        arguments = function.samples(3, 0)
        exact = function.exact()(*(x.double() if x.is_floating_point() else x for x in arguments))
        for got, want in zip(function.call(*arguments), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_keys_of_engines_follow_from_it(decoder: Path, tmp_path: Path) -> None:
    save_decoder(tiny(1), tmp_path, torch.float32)

    def specs(**settings: Any) -> dict[str, Any]:
        functions = pipeline(**settings).functions()
        return {function.name: engine_spec(function, "inductor", "cpu test") for function in functions}

    plain, first, second = specs(), specs(guidance_decoder=str(decoder)), specs(guidance_decoder=str(tmp_path))
    assert plain["unet"].key() == first["unet"].key() and plain["decode"].key() == first["decode"].key()
    assert len({found["gradient"].key() for found in (plain, first, second)}) == 3
    assert first["gradient"].components.keys() == {"guidance_decoder", "teacher"}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: tiny(channels=4), "it enlarges latents of 4 channels 2 times, the prior's have 2 and 2"),
        (lambda: tiny(levels=3), "it enlarges latents of 2 channels 4 times, the prior's have 2 and 2"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(tmp_path: Path, made: Any, words: str) -> None:
    save_decoder(made(), tmp_path, torch.float32)
    with pytest.raises(UsageError, match=r"--guidance-decoder: decoder .* does not fit the prior small") as error:
        pipeline(guidance_decoder=str(tmp_path))
    assert words in str(error.value)


def test_what_is_no_decoder_is_refused(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such folder"):
        check_decoder(tmp_path / "absent")
    with pytest.raises(EngineError, match=r"config.json is missing"):
        check_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(EngineError, match="is a UNet2DModel: want one of AutoencoderTiny"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((decoder / "config.json").read_bytes())
    with pytest.raises(EngineError, match="could not be loaded"):
        Decoder.from_pretrained(tmp_path)
    save_decoder(tiny(levels=3), tmp_path, torch.float32)
    (tmp_path / "config.json").write_bytes((decoder / "config.json").read_bytes())
    with pytest.raises(EngineError, match=r"decoder\."):
        Decoder.from_pretrained(tmp_path)


def test_without_a_teacher_it_is_not_there(decoder: Path) -> None:
    """A control without guidance keeps the other settings of its run."""
    pipe = pipeline(guidance_decoder=str(decoder), guidance_step=0.0)
    assert pipe.guidance_decoder is None and pipe.identity() == pipeline(guidance_step=0.0).identity()


def test_a_diffusers_pipelines_guidance_takes_the_decoder_itself(decoder: Path) -> None:
    """There it is the argument vae; of a GuidedPipeline the gradient is that pipeline's own."""
    with pytest.raises(SettingError, match="TeacherGuidance has no setting 'decoder'"):
        TeacherGuidance(classifier(), tiny(), decoder=str(decoder))
    pipe = pipeline(guidance_decoder=str(decoder))
    clean = torch.randn(7, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    push = TeacherGuidance.of(pipe).for_labels([0, 1, 2, 0, 1, 2, 0]).push(clean, 0, 4)
    gradient, _ = pipe.guidance.gradient(clean, torch.tensor([0, 1, 2, 0, 1, 2, 0]), 7)
    torch.testing.assert_close(push, -pipe.config.guidance.step * unit_rms(gradient))


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_id_is_fetched_unless_nothing_may_be(
    monkeypatch: pytest.MonkeyPatch, decoder: Path, offline: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append({"name": name, "offline": given["local_files_only"]})
        if offline:
            raise FileNotFoundError("not in the cache")
        return str(decoder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    prior = SmallPrior()
    prior.files = {"offline": offline}
    if offline:
        with pytest.raises(UsageError, match="it could not be fetched from the hub"):
            pipeline(prior, guidance_decoder="owner/tiny")
    else:
        assert pipeline(prior, guidance_decoder="owner/tiny").guidance_decoder is not None
    assert asked == [{"name": "owner/tiny", "offline": offline}]
