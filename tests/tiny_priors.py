"""A pipeline of reduced width with random weights of every family of priors, and what diffusers itself makes of it.

Latents are [B, 4, 8, 8] and images [B, 3, 16, 16] in all of them; the configs are those of published models, thinned.
`make_tiny_prior(name, folder)` writes one as diffusers' save_pretrained writes it; `unguided` runs diffusers' pipeline.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests import tiny_sd
from tests.synthesis import small_sd

WIDTH = tiny_sd.WIDTH  # of each text encoder's embeddings
SIZE = 8  # of the latents
SIDE = 16  # of the images

UNET = tiny_sd.UNET | small_sd.UNET
VAE = tiny_sd.VAE | small_sd.VAE
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING: dict[str, Any] = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
TRAILING: dict[str, Any] = {**BETAS, "timestep_spacing": "trailing"}
IMAGENET = {0: "naught, zero", 1: "one", 2: "ice bear, Two", 3: "three"}  # id2label: synonyms, separated by ", "
CLASSES = 1000  # of a DiT, whose pipeline takes 1000 for "no class"
PIXEL_CLASSES = ("zero", "one", "two")
PIXELS: dict[str, Any] = {  # unet/config.json of google/ddpm-cifar10-32, thinned
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
    "sample_size": SIDE,
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def _autoencoder(**own: Any) -> AutoencoderKL:
    return AutoencoderKL(**VAE | own)


def _clip(folder: Path, part: str, kind: type = CLIPTextModel, **own: Any) -> tuple[Any, CLIPTokenizer]:
    """A text encoder, two layers, and its tokenizer, whose files are in `folder` / `part`."""
    tokenizer = tiny_sd.write_tokenizer(folder / part)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tiny_sd.TEXT | special | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return kind(CLIPTextConfig(**text | own)), tokenizer


def _stable_diffusion(folder: Path, scheduler: Any, kind: type = StableDiffusionPipeline, **unet: Any) -> Any:
    text_encoder, tokenizer = _clip(folder, "tokenizer")
    return kind(
        unet=UNet2DConditionModel(**UNET | unet),
        vae=_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd1(folder: Path) -> Any:
    return _stable_diffusion(folder, diffusers.PNDMScheduler(**tiny_sd.SCHEDULER))


def _sd2(folder: Path) -> Any:
    """Stable Diffusion 2.1 as its authors of arXiv 2305.08891 have it: velocities, and no signal in the first level."""
    scheduler = diffusers.DDIMScheduler(
        **TRAILING,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return _stable_diffusion(folder, scheduler, use_linear_projection=True)


def _sd_turbo(folder: Path) -> Any:
    return _stable_diffusion(folder, diffusers.EulerDiscreteScheduler(**TRAILING), use_linear_projection=True)


def _lcm(folder: Path) -> Any:
    scheduler = diffusers.LCMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1)
    return _stable_diffusion(folder, scheduler, LatentConsistencyModelPipeline, time_cond_proj_dim=16)


def _sdxl(folder: Path, scheduler: Any = None) -> Any:
    text_encoder, tokenizer = _clip(folder, "tokenizer")
    second, second_tokenizer = _clip(
        folder, "tokenizer_2", CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=24
    )
    second_tokenizer.pad_token = "."  # another token than the first one's, "!" in the original
    unet = UNet2DConditionModel(
        **UNET
        | {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
            "transformer_layers_per_block": (2, 1),
            "use_linear_projection": True,
        }
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_autoencoder(scaling_factor=0.7, force_upcast=True),
        text_encoder=text_encoder,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer,
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**LEADING),
        add_watermarker=False,
    )


def _sdxl_turbo(folder: Path) -> Any:
    return _sdxl(folder, diffusers.EulerAncestralDiscreteScheduler(**TRAILING))


def _dit(folder: Path) -> Any:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # prediction and variance
        num_layers=2,
        sample_size=SIZE,
        num_embeds_ada_norm=CLASSES,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    return DiTPipeline(transformer, _autoencoder(), scheduler)


def _sd3(folder: Path, t5: bool = False) -> Any:
    encoders = {}
    for i, width in enumerate((WIDTH, 24)):
        own = {"projection_dim": width, "num_attention_heads": 4, "hidden_size": width}
        tokenizer_name = f"tokenizer{'_2' * i}"
        encoders[f"text_encoder{'_2' * i}"], encoders[tokenizer_name] = _clip(
            folder, tokenizer_name, CLIPTextModelWithProjection, **own
        )
    transformer = SD3Transformer2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,  # wider than both CLIPs' together: the rest is zeros
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH + 24,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    third, third_tokenizer = _t5() if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_autoencoder(scaling_factor=0.8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
        **encoders,
    )


def _t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder of width 64 and a tokenizer of letters and digits."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=64,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config), tokenizer


def _sd3_t5(folder: Path) -> Any:
    return _sd3(folder, t5=True)


def _pixels(folder: Path, **unet: Any) -> Any:
    return DDPMPipeline(UNet2DModel(**PIXELS | unet), DDPMScheduler(beta_start=0.0001, beta_end=0.02))


def _class_pixels(folder: Path) -> Any:
    """Classes by their names in dfkd.json; the last embedding, the null class, stands for none."""
    facts = {"prompt": "{label}", "labels": PIXEL_CLASSES, "null_class": len(PIXEL_CLASSES)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dfkd.json").write_text(json.dumps(facts))
    pipeline = _pixels(folder, num_class_embeds=len(PIXEL_CLASSES) + 1)
    pipeline.scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return pipeline


def _class_latents(folder: Path) -> Any:
    """The same on latents: a vae/ beside the pipeline, as dfkd-train-prior writes it."""
    pipeline = _class_pixels(folder)
    _autoencoder().save_pretrained(folder / "vae")
    own = {"sample_size": SIZE, "in_channels": 4, "out_channels": 4, "num_class_embeds": len(PIXEL_CLASSES) + 1}
    pipeline.unet = UNet2DModel(**PIXELS | own)
    pipeline.scheduler.register_to_config(clip_sample=False)
    return pipeline


MAKERS: Mapping[str, Callable[[Path], Any]] = {
    "sd1": _sd1,
    "sd2": _sd2,
    "sd-turbo": _sd_turbo,
    "lcm": _lcm,
    "sdxl": _sdxl,
    "sdxl-turbo": _sdxl_turbo,
    "dit": _dit,
    "sd3": _sd3,
    "sd3-t5": _sd3_t5,
    "pixels": _pixels,
    "pixels-flat": _pixels,
    "class-pixels": _class_pixels,
    "class-latents": _class_latents,
}


def make_tiny_prior(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the pipeline `name`, a key of MAKERS, to `folder` and return it.

    The weights are drawn from the seed, all of them: what starts at zero (the gates of a transformer's blocks, its last
    layer) would hide its inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = MAKERS[name](folder)
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
    if name == "dit":  # an entry of the published model_index.json, which save_pretrained leaves out
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {str(i): IMAGENET.get(i, f"class {i}") for i in range(CLASSES)}
        (folder / "model_index.json").write_text(json.dumps(index))
    if name == "pixels-flat":  # as google/ddpm-cifar10-32 is: all files side by side
        for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            file.rename(folder / file.name)
        for part in ("unet", "scheduler"):
            shutil.rmtree(folder / part)
    return folder


@contextmanager
def drawing(module: Any, tensors: Sequence[Tensor]) -> Iterator[None]:
    """`randn_tensor` of a module of diffusers gives these tensors in turn, for pipelines that take no noise."""
    turn = iter(tensors)
    with patch.object(module, "randn_tensor", lambda shape, **_: next(turn).expand(shape)):
        yield


def unguided(
    folder: Path,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    scheduler: str,
    steps: int,
    cfg: float,
    negative: str | None = None,
    between: Sequence[Tensor] = (),
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The images [B, 3, H, W] in 0..1 that diffusers' own pipeline in `folder` draws from unit noise [B, C, h, w].

    prompts: texts, or names of classes; ignored by a prior without a condition. scheduler: name of the diffusers class
    in place of the folder's own. options: entries of its config, where the folder's has none. cfg: diffusers'
    guidance_scale. between: noise of each step that adds some. The pipelines of classes and of pixels take no noise:
    theirs is put in the place of what they draw. diffusers has none for classes of a UNet2DModel: the plain loop is
    here.
    """
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, kind in index.items() if kind == [None, None]}  # Stable Diffusion 3 without its T5
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **absent)
    pipeline.set_progress_bar_config(disable=True)
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **(options or {}))
    noise = noise.to(dtype)
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    with drawing(_module(kind), [n.to(dtype) for n in between]) if between else _nothing():
        if isinstance(pipeline, DiTPipeline):
            with drawing(_module(DiTPipeline), [noise]):
                ids = pipeline.get_label_ids(list(prompts))
                images = pipeline(ids, guidance_scale=cfg, **common).images
        elif isinstance(pipeline, DDPMPipeline):
            if pipeline.unet.config.num_class_embeds:
                images = _of_classes(pipeline, noise, [PIXEL_CLASSES.index(name) for name in prompts], steps, cfg)
                if (folder / "vae").exists():
                    vae = AutoencoderKL.from_pretrained(folder / "vae").to(dtype)
                    with torch.no_grad():
                        images = vae.decode(images / vae.config.scaling_factor).sample
                return torch.as_tensor(images / 2 + 0.5).clamp(0, 1)
            with drawing(_module(DDPMPipeline), [noise]):
                images = pipeline(batch_size=len(noise), **common).images
        else:
            if not isinstance(pipeline, LatentConsistencyModelPipeline):
                common["negative_prompt"] = None if negative is None else [negative] * len(noise)
            images = pipeline(prompt=list(prompts), latents=noise, guidance_scale=cfg, **common).images
    found: Tensor = torch.as_tensor(images)
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _module(kind: type) -> Any:
    return importlib.import_module(kind.__module__)


@torch.no_grad()
def _of_classes(pipeline: Any, image: Tensor, ids: Sequence[int], steps: int, cfg: float) -> Tensor:
    """DDPMPipeline's loop with classes and classifier-free guidance (arXiv 2207.12598), its null class the last one."""
    given = torch.tensor(ids)
    none = torch.full_like(given, len(PIXEL_CLASSES))
    pipeline.scheduler.set_timesteps(steps)
    for t in pipeline.scheduler.timesteps:
        output = pipeline.unet(image, t, class_labels=given).sample
        if cfg > 1:
            without = pipeline.unet(image, t, class_labels=none).sample
            output = without + cfg * (output - without)
        image = pipeline.scheduler.step(output, t, image).prev_sample
    return image
