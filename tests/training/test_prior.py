"""Training of a prior: every kind is saved in diffusers' layout and loads again, and a stopped run goes on alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dfkd.config import PriorTrainConfig
from dfkd.data import Pool
from dfkd.errors import UsageError
from dfkd.training import prior as module
from dfkd.training.autoencoder import STAGE
from dfkd.training.loop import Progress
from dfkd.training.prior import train_prior
from dfkd_engine.errors import EngineError
from dfkd_engine.priors.prior import Prior
from tests.training.small_run import Killed, dies, lines, result

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "widths": (8, 16),
    "head_width": 8,
    "norm_groups": 4,
    "attention_at": 4,
    "checkpoint_every": 2,
    "weights": "fp32",
    "device": "cpu",
    "warmup": 0,
}
LATENT = {
    "space": "latent",
    "predict": "v",
    "autoencoder_widths": (8, 8),
    "latent_channels": 4,
    "autoencoder_steps": 3,
    "autoencoder_batch_size": 4,
}
TEXT = {**LATENT, "condition": "text", "text_width": 16, "prompts": ("a {label}", "{label}"), "free_prompts": ("a",)}
KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "none": {"condition": "none", "predict": "epsilon"},
    "patch": {"space": "patch", "attention_at": 2},
    "latent": {**LATENT, "predict": "flow"},
    "text": TEXT,
}
NAMES = ("red_fox", "owl", "cat")


def pool(count: int = 24, seed: int = 0) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Pool(images, torch.arange(count) % 3, torch.arange(count), NAMES)


def settings(**changes: Any) -> PriorTrainConfig:
    return PriorTrainConfig.of(**{**SMALL, **changes})


def train(out: Path, config: PriorTrainConfig, **given: Any) -> Path:
    return train_prior({"train": pool(), "validation": pool(9, 1)}, config, out, **{"size": 8, **given})


def weights(out: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(out / part / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prior of every kind."""
    root = tmp_path_factory.mktemp("priors")
    return {kind: train(root / kind, settings(**changes)) for kind, changes in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_a_prior(made: dict[str, Path], kind: str) -> None:
    out = made[kind]
    prior = Prior.from_pretrained(out)
    assert (prior.vae is None) == (kind in ("class", "none"))
    assert prior.latent_channels == (3 if prior.vae is None else 12 if kind == "patch" else 4)
    assert prior.latent_size[0] * prior.vae_scale_factor == 8
    found = result(out)
    assert found["steps"] == 4 and found["bytes"] > 0 and found["validation_loss"] > 0
    assert "## How to use it" in (out / "README.md").read_text()
    assert not list(out.glob("*.partial")) and not (out / "checkpoint.pt").exists()
    assert (out / "preview.png").exists() and len([line for line in lines(out) if "validation_loss" in line]) == 2


def test_the_facts_of_each_kind(made: dict[str, Path]) -> None:
    labels = ["red fox", "owl", "cat"]
    facts = {kind: json.loads((out / "dfkd.json").read_text()) for kind, out in made.items() if kind != "none"}
    assert facts["class"] == facts["latent"] == {"prompt": "{label}", "labels": labels, "null_class": 3}
    assert facts["patch"] == {**facts["class"], "patch_size": 2}
    assert facts["text"] == {"prompt": "a {label}", "labels": labels}
    assert not (made["none"] / "dfkd.json").exists()


def test_pipelines_of_diffusers_load_it(made: dict[str, Path]) -> None:
    from diffusers import DDPMPipeline, StableDiffusionPipeline

    text = StableDiffusionPipeline.from_pretrained(made["text"])
    text.set_progress_bar_config(disable=True)
    words = text.tokenizer("a red fox, an owl").input_ids
    assert text.tokenizer.convert_ids_to_tokens(words)[1:4] == ["a</w>", "red</w>", "fox</w>"]
    images = text("a red fox", num_inference_steps=2, height=8, width=8, output_type="pt").images
    assert images.shape == (1, 3, 8, 8) and images.isfinite().all()
    plain = DDPMPipeline.from_pretrained(made["none"])
    plain.set_progress_bar_config(disable=True)
    assert plain(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_patches_are_an_exact_autoencoder(made: dict[str, Path], tmp_path: Path) -> None:
    """Of the pixels themselves: decoding what was encoded is the image, and each latent is one pixel of a patch."""
    prior = Prior.from_pretrained(made["patch"])
    images = torch.rand(2, 3, 8, 8)
    z = prior.encode(images)
    assert z.shape == (2, 12, 4, 4) and torch.allclose(z[:, 4 + 2 + 1, 1, 2], 4 * images[:, 1, 3, 5] - 2)
    assert torch.allclose(prior.decode(z), images, atol=1e-6)
    assert prior.doubled().decode(z.double()).dtype == torch.float64
    again = train(tmp_path / "more", settings(steps=2), size=None, prior=str(made["patch"]))
    assert json.loads((again / "dfkd.json").read_text()) == json.loads((made["patch"] / "dfkd.json").read_text())


@pytest.mark.parametrize(
    ("size", "why"),
    [(4, "unet takes 12 and gives 12 channels: without a VAE they are those of an image, 48"), (3, "a power of two")],
)
def test_patches_that_do_not_fit_are_refused(made: dict[str, Path], tmp_path: Path, size: int, why: str) -> None:
    shutil.copytree(made["patch"], tmp_path / "odd")
    facts = json.loads((tmp_path / "odd" / "dfkd.json").read_text())
    (tmp_path / "odd" / "dfkd.json").write_text(json.dumps({**facts, "patch_size": size}))
    with pytest.raises(EngineError, match=why):
        Prior.from_pretrained(tmp_path / "odd")


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_run_that_was_killed_ends_alike(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Killed in each stage, at a step after a checkpoint: the same bits on a CPU."""
    for step in (1, 3):
        with pytest.raises(Killed):
            train(tmp_path, settings(**KINDS[kind]), progress=dies(step))
    train(tmp_path, settings(**KINDS[kind]))
    for part in ("unet", "vae")[: 1 + (kind == "text")]:
        mine, theirs = weights(tmp_path, part), weights(made[kind], part)
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert lines(tmp_path) == lines(made[kind])


def test_a_finished_run_is_not_repeated(made: dict[str, Path]) -> None:
    train(made["class"], settings(), progress=dies(0))
    with pytest.raises(UsageError, match=r"lr is 0.001 there and 0.1 here"):
        train(made["class"], settings(lr=0.1))


def test_it_learns(tmp_path: Path) -> None:
    """Images of one grey level a class: the loss falls far below that of noise, and samples take the level."""
    levels = torch.tensor([40, 128, 215], dtype=torch.uint8)
    labels = torch.arange(24) % 3
    images = levels[labels].view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    data = Pool(images, labels, torch.arange(24), NAMES)
    config = settings(steps=150, batch_size=16, lr=5e-3, ema=0.9, checkpoint_every=150, widths=(16, 16))
    train_prior({"train": data, "validation": data}, config, tmp_path, size=8)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < 0.35 * losses[0]
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    from dfkd.training.denoising import Denoising, sample

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    network = Denoising(UNet2DModel.from_pretrained(tmp_path / "unet").eval(), scheduler)
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = sample(network, scheduler, noise, (torch.arange(3),), (), cfg=1.0).mean((1, 2, 3))
    assert (drawn.diff() > 0.25).all()  # the levels are 0.69 apart


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"size": 9}, "--size 9: 2 --widths halve the side 1 times, and 9 is not a multiple of 2"),
        (
            LATENT,
            {"size": 10},
            "after an autoencoder or patches that divide it by 2, and 10 is not a multiple of 4. use 8",
        ),
        ({"amp": "fp16"}, {}, "--amp fp16 on a CPU"),
        ({}, {"prior": "no/where/at/all", "size": None}, "no such folder"),
        ({"lora_rank": 2}, {"prior": "demo", "size": 20}, "--size 20: the prior's networks want a multiple of 8"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    from dfkd_engine.errors import EngineError

    out = tmp_path / "out"
    with pytest.raises((UsageError, EngineError)) as error:
        train(out, settings(**changes), **given)
    assert words in str(error.value) and not out.exists()


def test_a_folder_of_another_prior_stays_as_it_is(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds something else: it has model_index.json"):
        train(tmp_path, settings(resume=False))
    assert (tmp_path / "model_index.json").read_text() == "{}"


FURTHER = {
    name: value for name, value in SMALL.items() if name not in ("widths", "head_width", "norm_groups", "attention_at")
}


def further(out: Path, prior: Path, progress: Progress | None = None, **changes: Any) -> Path:
    """A prior that exists, trained for four steps."""
    config = PriorTrainConfig.of(**{**FURTHER, **changes})
    return train(out, config, prior=str(prior), size=None, progress=progress)


def test_all_weights_of_a_prior_that_exists(made: dict[str, Path], tmp_path: Path) -> None:
    out = further(tmp_path, made["text"], prompts=("an {label}",), lr=1e-2)
    before, after = weights(made["text"]), weights(out)
    assert before.keys() == after.keys() and not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        mine, theirs = (load_file(folder / part / f"{file}.safetensors") for folder in (out, made["text"]))
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert Prior.from_pretrained(out).prompt == "an {label}"
    assert "| changed | UNet |" in (out / "README.md").read_text()


def test_the_text_encoder_learns_where_asked(made: dict[str, Path], tmp_path: Path) -> None:
    out = further(tmp_path, made["text"], train_text_encoder=True, lr=1e-2)
    mine, theirs = (load_file(folder / "text_encoder/model.safetensors") for folder in (out, made["text"]))
    assert mine.keys() == theirs.keys()
    assert not all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert not torch.equal(weights(made["text"])["conv_in.weight"], weights(out)["conv_in.weight"])


def test_low_rank_changes_are_saved_alone_and_load(made: dict[str, Path], tmp_path: Path) -> None:
    """Killed and resumed too: only what learns is in the checkpoint."""
    with pytest.raises(Killed):
        further(tmp_path, made["text"], dies(3), lora_rank=2, lr=0.1)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    assert kept and all("lora_" in name for name in kept)
    out = further(tmp_path, made["text"], lora_rank=2, lr=0.1)
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    assert {len(value) for name, value in saved.items() if "lora_A" in name or ".down." in name} == {2}
    assert not (out / "unet").exists() and "--lora FOLDER" in (out / "README.md").read_text()
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(made["text"])
    z, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    context = torch.randn(1, 16, 16)
    plain = pipeline.unet(z, t, context).sample
    pipeline.load_lora_weights(out)
    assert not torch.equal(pipeline.unet(z, t, context).sample, plain)


def test_a_class_conditional_prior_goes_on_with_its_own_classes(made: dict[str, Path], tmp_path: Path) -> None:
    out = further(tmp_path / "same", made["class"], lr=1e-2)
    assert (out / "dfkd.json").read_text() == (made["class"] / "dfkd.json").read_text()
    assert not torch.equal(weights(made["class"])["conv_in.weight"], weights(out)["conv_in.weight"])
    other = Pool(pool().images, pool().labels, pool().ids, ("owl", "red_fox", "cat"))
    with pytest.raises(UsageError, match="class embeddings are of red fox, owl, cat"):
        train_prior(
            {"train": other, "validation": other},
            PriorTrainConfig.of(**FURTHER),
            tmp_path / "other",
            prior=str(made["class"]),
        )
    with pytest.raises(UsageError, match=r"--train-text-encoder with --prior .*: it has no text encoder"):
        further(tmp_path / "text", made["class"], train_text_encoder=True)


def test_seconds_are_those_of_both_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module.read_result

    def read(folder: Path) -> dict[str, Any] | None:
        found = own(folder)
        return found and found | ({"seconds": 1000.0} if folder.name == STAGE else {})

    monkeypatch.setattr(module, "read_result", read)
    assert 1000 < result(train(tmp_path / "latent", settings(**KINDS["latent"])))["seconds"] < 1060
    assert 0 < result(train(tmp_path / "pixels", settings(**KINDS["class"])))["seconds"] < 60


def test_the_residual_blocks_of_an_autoencoder(tmp_path: Path) -> None:
    """None on the way in leaves a decoder with one a level, and what is written loads with it."""
    thin = train(tmp_path, settings(**LATENT, autoencoder_blocks=0))
    assert json.loads((thin / "vae" / "config.json").read_text())["layers_per_block"] == 0
    decoder = Prior.from_pretrained(thin).vae.decoder
    assert [len(level.resnets) for level in decoder.up_blocks] == [1, 1]
    with pytest.raises(ValueError, match=r"--autoencoder-blocks 0 with --autoencoder-widths of several values"):
        settings(**{**LATENT, "autoencoder_blocks": 0, "autoencoder_widths": (8, 16)})


def test_an_autoencoder_that_exists_is_taken(made: dict[str, Path], tmp_path: Path) -> None:
    config = settings(space="latent", vae=str(made["text"]))
    out = train(tmp_path, config)
    mine, theirs = weights(out, "vae"), weights(made["text"], "vae")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert Prior.from_pretrained(out).latent_channels == 4


def test_a_classifier_reads_samples_of_the_finished_prior(tmp_path: Path) -> None:
    from tests.cli.small_generate import save_classifier

    judge = save_classifier(tmp_path / "judge", names=("cat", "owl", "dog"), size=8)
    out = train(tmp_path / "out", settings(), judge=judge)
    judged = result(out)["judged"]
    assert judged["samples"] == 200 and judged["right"].keys() == {"1", "3"}
    assert all(0 <= share <= 1 for share in judged["right"].values())
    assert "| 200 samples of 20 steps read right by " in (out / "README.md").read_text()
    stranger = save_classifier(tmp_path / "stranger", names=("a", "b", "c"), size=8)
    with pytest.raises(UsageError, match="has no class of the images"):
        train(tmp_path / "other", settings(), judge=stranger)


def test_the_preset_makes_the_embedded_priors_networks() -> None:
    """Names and shapes of every weight, but for the words that its tokenizer knows whole."""
    from dfkd.training.prior_networks import make_autoencoder
    from dfkd.training.prior_parts import new_parts
    from dfkd_engine import EMBEDDED

    config = PriorTrainConfig.preset("demo-prior")
    vae = make_autoencoder(config.autoencoder, config.denoiser.norm_groups, 32)
    parts = new_parts(config, 32, [*"abcdefghij"], vae, torch.device("cpu"))
    made = {"unet": parts.denoiser, "vae": vae, "text_encoder": parts.text_encoder}
    for part, network in made.items():
        (file,) = (EMBEDDED["demo"] / part).glob("*.safetensors")
        shapes = {name: value.shape for name, value in load_file(file).items() if "token_embedding" not in name}
        own = {name: p.shape for name, p in network.named_parameters() if "token_embedding" not in name}
        assert own == shapes, part
    assert parts.scheduler.config["prediction_type"] == "v_prediction"


def test_a_prior_is_not_written_over_itself(made: dict[str, Path]) -> None:
    before = weights(made["text"])
    with pytest.raises(UsageError, match="is what is read"):
        further(made["text"], made["text"], resume=False)
    assert all(torch.equal(value, before[name]) for name, value in weights(made["text"]).items())


def test_previews_of_any_schedule_are_ddims(made: dict[str, Path]) -> None:
    """Of a prior whose scheduler scales what goes in (Euler's) or remembers (PNDM's) the samples are the same."""
    from dataclasses import replace

    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    from dfkd.training.prior_existing import existing_parts, open_existing
    from dfkd.training.prior_samples import draw_images
    from dfkd_engine.priors.source import PriorSource

    config = PriorTrainConfig.of(**FURTHER)
    folder, side = open_existing(PriorSource(made["text"]), config, None)
    parts = existing_parts(folder, config, side, NAMES, torch.device("cpu"))
    drawn = []
    for kind in (DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler):
        own = replace(parts, scheduler=kind.from_config(parts.scheduler.config))
        drawn.append(draw_images(own, parts.denoising, torch.tensor([0, 2]), 0, "preview", steps=3))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_from_nothing_the_side_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no size"):
        train(tmp_path / "out", settings(), size=None)
    assert not (tmp_path / "out").exists()


def test_times_of_a_flow_are_shifted_as_the_sampler_shifts_them() -> None:
    """Of pixels, whose deviation is about a half, the median time is a third: half the odds of the middle."""
    from dfkd.training.denoising import Denoising
    from dfkd.training.prior_networks import make_scheduler

    torch.manual_seed(0)
    medians = []
    for own in (settings().denoiser, settings(**{**LATENT, "predict": "flow"}).denoiser):
        scheduler = make_scheduler(own)
        time, alpha, sigma = Denoising(torch.nn.Identity(), scheduler).levels(20_001, torch.device("cpu"))
        assert torch.equal(time, 1000 * sigma.flatten()) and torch.allclose(alpha + sigma, torch.ones(()))
        medians.append(float(sigma.median()))
        scheduler.set_timesteps(1001)
        assert float(scheduler.sigmas[500]) == pytest.approx(medians[-1], abs=0.01)
    assert medians == pytest.approx([1 / 3, 1 / 2], abs=0.01)
