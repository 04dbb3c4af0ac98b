"""Settings of training a diffusion prior, and a tiny decoder of one."""

from dataclasses import dataclass

from dfkd.config.fields import Config, nested, option
from dfkd.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(Config):
    """Denoiser: a UNet that is trained from nothing"""

    EXAMPLE = "--space pixel --condition class --widths 32,64,128 --attention-at 8"

    space: str = option(
        "pixel",
        "what it denoises: pixels; patches of 2x2 pixels, as 12 channels at half the side, which is quicker; or the"
        " latents of an autoencoder that is trained before it",
        choices=("pixel", "patch", "latent"),
    )
    condition: str = option(
        "class",
        "what it is told: the class's number, the words of a prompt through a CLIP text encoder, or nothing",
        choices=("class", "text", "none"),
    )
    predict: str = option(
        "flow",
        "what it answers with: the noise, v of a discrete schedule, or flow matching's noise minus image",
        choices=("flow", "v", "epsilon"),
    )
    widths: tuple[int, ...] = option((32, 64, 128, 128), "channels of each level, at half the side each", low=1)
    blocks: int = option(1, "residual blocks of a level on the way down; one more on the way up", low=1)
    attention_at: int = option(8, "largest side, in what is denoised, at which there is attention; 0: nowhere", low=0)
    head_width: int = option(16, "channels of an attention head", low=1)
    norm_groups: int = option(8, "groups of channels in every norm, of the autoencoder's too", low=1)
    text_width: int = option(64, "condition text: width of the text encoder", low=8)
    text_layers: int = option(1, "condition text: its layers", low=1)

    def validate(self) -> None:
        if not self.widths:
            raise ValueError("--widths names no level")
        if self.condition != "text" and (self.text_width, self.text_layers) != (64, 1):
            raise ValueError("--text-width and --text-layers are of --condition text")
        if self.condition == "text" and (self.space, self.predict == "flow") != ("latent", False):
            raise ValueError(
                "--condition text makes a pipeline of the Stable Diffusion kind: it needs --space latent and --predict"
                " v or epsilon"
            )
        for name, values in (("widths", self.widths), ("text-width", (self.text_width,))):
            if odd := [value for value in values if value % self.head_width]:
                raise ValueError(f"--{name} has {odd[0]}, which --head-width {self.head_width} does not divide")
        if odd := [value for value in self.widths if value % self.norm_groups]:
            raise ValueError(f"--widths has {odd[0]}, which --norm-groups {self.norm_groups} does not divide")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Config):
    """Autoencoder of --space latent: which, or how it is trained"""

    EXAMPLE = "--space latent --autoencoder-steps 2400"

    source: str | None = option(
        None, "a pipeline whose VAE is taken as it is, instead of training one: a folder or a hub id", flag="vae"
    )
    data: str | None = option(
        None, "images that it learns from instead of --data; their classes do not count", flag="autoencoder_data"
    )
    widths: tuple[int, ...] = option(
        (16, 32, 48),
        "its channels at each level; every level but the first halves the side",
        low=1,
        flag="autoencoder_widths",
    )
    blocks: int = option(
        1,
        "its residual blocks of a level on the way in, one more on the way out; with 0 all levels have one width",
        low=0,
        flag="autoencoder_blocks",
    )
    channels: int = option(8, "channels of the latents", low=1, flag="latent_channels")
    steps: int = option(2400, "length of its training", unit="steps", low=1, flag="autoencoder_steps")
    batch_size: int = option(32, "images per step", unit="images", low=2, flag="autoencoder_batch_size")
    lr: float = option(2e-3, "its highest learning rate", low=0, flag="autoencoder_lr")
    edge_weight: float = option(0.5, "weight of the L1 of neighbouring pixels' differences", low=0)
    kl_weight: float = option(1e-3, "weight of the KL divergence that keeps the latents one cloud", low=0)

    def validate(self) -> None:
        if self.source is not None and (own := [name for name in self.changed() if name != "vae"]):
            raise ValueError(f"--{own[0].replace('_', '-')} with --vae: that one is taken as it is; leave one out")
        if not self.blocks and len(set(self.widths)) > 1:
            why = "it is a residual block that changes the number of channels"
            raise ValueError(f"--autoencoder-blocks 0 with --autoencoder-widths of several values: {why}")


@dataclass(frozen=True, kw_only=True)
class PriorTrainConfig(Config):
    """Training of a diffusion prior on images: from nothing, or of a pipeline that exists."""

    SECTION = "prior"

    train: TrainConfig = nested(
        TrainConfig,
        steps=10_000,
        batch_size=64,
        augment="flip",
        optimiser="adamw",
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.01,
        decay="weights",
        schedule="trapezoid",
        warmup=200,
        clip_norm=1.0,
        ema=0.999,
    )
    denoiser: DenoiserConfig = nested(DenoiserConfig)
    autoencoder: AutoencoderConfig = nested(AutoencoderConfig)
    prompts: tuple[str, ...] = option(
        ("a photo of a {label}",), "condition text: templates, drawn evenly; the first becomes the prior's own"
    )
    free_prompts: tuple[str, ...] = option(
        (), "condition text: prompts, beside the empty one, of images whose class is left out"
    )
    drop: float = option(
        0.1, "share of images whose class is left out, which classifier-free guidance needs", low=0, high=1
    )
    lora_rank: int = option(0, "with --prior: train low-rank changes of its attention alone; 0: all weights", low=0)
    train_text_encoder: bool = option(False, "with --prior: train its text encoder too")
    weights: str = option("fp16", "precision of the files", choices=("fp16", "fp32"))

    def validate(self) -> None:
        if not self.prompts:
            raise ValueError("--prompts names none: the first is the prior's own")
        if self.lora_rank and self.train_text_encoder:
            raise ValueError("--lora-rank changes the denoiser alone: leave --train-text-encoder out")


@dataclass(frozen=True, kw_only=True)
class DecoderTrainConfig(Config):
    """Training of a tiny decoder of a prior's latents, on what the prior itself draws."""

    SECTION = "decoder"

    train: TrainConfig = nested(
        TrainConfig,
        steps=2000,
        batch_size=16,
        augment="none",
        optimiser="adamw",
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.0,
        schedule="cosine",
        warmup=100,
        clip_norm=1.0,
        ema=0.99,
    )
    images: int = option(512, "trajectories of the prior to learn from; a sixteenth is held out", unit="images", low=16)
    classes: tuple[str, ...] = option((), "words for {label} in the prompt; none: those that the prior states")
    prompt: str | None = option(None, "template; none: the prior's own")
    size: int = option(0, "height and width of the images; 0: the prior's own", unit="pixels", low=0)
    cfg: float | None = option(None, "classifier-free guidance scale, as of dfkd-generate", low=0)
    sample_steps: int = option(20, "denoising steps of a trajectory, by ddim", low=1, high=1000)
    estimates: int = option(4, "of the steps of a trajectory, whose clean estimates are decoded", low=1)
    width: int = option(64, "channels of every layer", low=1)
    blocks: int = option(3, "residual blocks of a level; the finest has one", low=1)
    edge_weight: float = option(0.5, "weight of the L1 of neighbouring pixels' differences", low=0)
    weights: str = option("fp16", "precision of the file", choices=("fp16", "fp32"))

    def validate(self) -> None:
        if self.train.augment != "none":
            why = "a view of an image is no answer to its latents"
            raise ValueError(f"--augment {self.train.augment}: {why}; leave it out")
