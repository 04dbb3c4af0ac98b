"""Trains the embedded prior: a Stable Diffusion pipeline of 2.3 M parameters that knows only world Y.

    python build/train_demo_prior.py --out dfkd/priors/demo            about an hour on one CPU core

Two stages: the autoencoder (world Y and procedural textures), kept in --work and not trained again when it is there;
then text encoder and denoiser together on cached latents of world Y. The result is written in half precision in the
layout of `StableDiffusionPipeline`, and judged: a classifier trained on world Y reads unguided samples, and the
accuracies go into judged.json.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.prior_world import CLASS_NAMES, autoencoder_images, prior_images

PROMPT = "a photo of the digit {label}"
PROMPTS = (PROMPT, PROMPT, PROMPT, "an image of the digit {label}", "a realistic photo of {label}", "{label}")
CLASS_FREE = ("", "a realistic photo", "an image.")
CLASS_FREE_SHARE = 0.15
WORDS = "a an image photo picture realistic of the digit number " + " ".join(CLASS_NAMES)
TOKENS = 16


def schedule(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batches(length: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index batches [batch], every epoch in a new order."""
    order = torch.randperm(length, generator=generator)
    at = 0
    for _ in range(steps):
        if at + batch > length:
            order, at = torch.randperm(length, generator=generator), 0
        yield order[at : at + batch]
        at += batch


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer that has the prompt's words whole and every other word in bytes."""
    symbols = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols)]
    for left, right in merges:
        if left + right not in vocabulary:
            vocabulary.append(left + right)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    files = {name: str(folder / file) for name, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))}
    return CLIPTokenizer(**files, model_max_length=TOKENS)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_unet(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def unit(images: Tensor) -> Tensor:
    """uint8 to the autoencoder's range -1..1, channels_last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(steps: int, seed: int) -> AutoencoderKL:
    """L1 of pixels and of their differences (edges), with a small KL so that latents form one cloud."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = autoencoder_images(40000, seed)
    vae = make_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.time()
    for step, index in enumerate(batches(len(images), 32, steps, generator)):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 2e-3)
        x = unit(images[index])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        pixel = F.l1_loss(y, x)
        edges = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = pixel + 0.5 * edges + 1e-3 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            losses = f"L1 {pixel:.4f} edges {edges:.4f} KL {kl:.3f}"
            print(f"autoencoder {step}/{steps} {losses} {time.time() - started:.0f} s", flush=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(unit(part)).latent_dist.mean for part in images.split(500)])


def train_denoiser(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, seed: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """v-prediction on cached latents; returns the exponential moving average of the weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = prior_images(60000, seed)
    latents = encode(vae, images) * vae.config.scaling_factor
    text = make_text_encoder(tokenizer)
    unet = make_unet(text.config.hidden_size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    both = nn.ModuleList([unet, text])
    average = torch.optim.swa_utils.AveragedModel(both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(both.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    abar = make_scheduler().alphas_cumprod
    prompts = [t.format(label=c) for t in PROMPTS for c in CLASS_NAMES] + list(CLASS_FREE)
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    started, mean_loss = time.time(), 0.0
    for step, index in enumerate(batches(len(latents), 64, steps, generator)):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 1.5e-3)
        z0, n = latents[index], len(index)
        # stratified noise levels: a lower variance of the loss than independent draws
        t = (torch.rand(1, generator=generator) + torch.arange(n)).div(n).mul(1000).long().clamp(0, 999)
        template = torch.randint(len(PROMPTS), (n,), generator=generator)
        which = template * len(CLASS_NAMES) + labels[index]
        free = len(PROMPTS) * len(CLASS_NAMES) + torch.randint(len(CLASS_FREE), (n,), generator=generator)
        which = torch.where(torch.rand(n, generator=generator) < CLASS_FREE_SHARE, free, which)
        noise = torch.randn(z0.shape, generator=generator)
        a = abar[t].sqrt()[:, None, None, None]
        s = (1 - abar[t]).sqrt()[:, None, None, None]
        unique, inverse = which.unique(return_inverse=True)
        context = text(tokens[unique]).last_hidden_state[inverse]
        v = unet((a * z0 + s * noise).contiguous(memory_format=torch.channels_last), t, context).sample
        loss = F.mse_loss(v, a * noise - s * z0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(both)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 100)
        if step % 100 == 0:
            print(f"denoiser {step}/{steps} v-loss {mean_loss:.4f} {time.time() - started:.0f} s", flush=True)
    unet, text = average.module
    return unet.eval().requires_grad_(False), text.eval().requires_grad_(False)


def prior_reader(seed: int, steps: int = 600) -> nn.Module:
    """The judge: a small classifier trained on world Y (about 99 % on fresh images of it)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = prior_images(30000, seed + 1)
    layers: list[nn.Module] = []
    for i, (width, stride) in enumerate(((32, 1), (64, 2), (96, 2), (128, 2))):
        layers += [nn.LazyConv2d(width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [] if i == 0 else [nn.LazyConv2d(width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(len(CLASS_NAMES)))
    net(unit(images[:2]))  # shapes the lazy layers
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    for step, index in enumerate(batches(len(images), 128, steps, generator)):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 2e-3)
        loss = F.cross_entropy(net(unit(images[index])), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def judge(folder: Path, seed: int = 0, count: int = 500, cfg: float = 5.0, steps: int = 20) -> dict[str, float]:
    """Samples by diffusers' own pipeline, read by a classifier of world Y. Accuracies in 0..1."""
    reader = prior_reader(seed)
    fresh, fresh_labels = prior_images(2000, seed + 99)
    on_world = (reader(unit(fresh)).argmax(1) == fresh_labels).float().mean().item()
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(count) % len(CLASS_NAMES)
    right = 0
    for part in labels.split(100):
        prompts = [PROMPT.format(label=CLASS_NAMES[int(c)]) for c in part]
        out = pipe(
            prompts,
            guidance_scale=cfg,
            num_inference_steps=steps,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed + right),
        ).images
        right += int((reader(out * 2 - 1).argmax(1) == part).sum())
    return {
        "reader_on_world_y": on_world,
        "reader_on_samples": right / count,
        "cfg": cfg,
        "steps": steps,
        "samples": count,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("dfkd/priors/demo"), help="folder of the pipeline")
    p.add_argument("--work", type=Path, default=Path("runs/demo-prior"), help="folder of the stages' files")
    p.add_argument("--autoencoder-steps", type=int, default=2400)
    p.add_argument("--denoiser-steps", type=int, default=3500)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    stage = a.work / f"autoencoder-{a.autoencoder_steps}-{a.seed}.pt"
    vae = make_vae()
    if stage.exists():
        vae.load_state_dict(torch.load(stage, weights_only=True))
        vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    else:
        vae = train_autoencoder(a.autoencoder_steps, a.seed)
        torch.save(vae.state_dict(), stage)
    sample, _ = prior_images(4000, a.seed + 7)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, sample).std().item(), 5))
    tokenizer = make_tokenizer(a.work / "tokenizer")
    unet, text = train_denoiser(vae, tokenizer, a.denoiser_steps, a.seed)
    pipe = StableDiffusionPipeline(
        vae,
        text,
        tokenizer,
        unet,
        make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(a.out, safe_serialization=True)
    judged = json.dumps(judge(a.out))
    (a.out / "judged.json").write_text(judged + "\n")
    print(judged)


if __name__ == "__main__":
    main()
