"""A word learned for each class before the first image: textual inversion (arXiv 2208.01618) by a teacher's losses.

    v_c <- Adam on  CE(T(x), c) + L_bn(x)      x = decode(z0hat(z_i, prompt with the word of c))

No image is needed: z_i is where an unguided trajectory of the prior's own noise is at a random step i, and z0hat the
estimate of that step, differentiated through teacher, decoder, denoiser and text encoder, whose weights stay. The two
losses are weighted as in guidance. A word begins as the mean of the tokens of its class's name.

OUT/class-words/class-3.safetensors     {"<class-3>": [D]}, which --textual-inversion takes in other runs too
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.files import make_writable, replace_file, sha256
from dfkd.synthesis.batching import calling
from dfkd.synthesis.guidance import Guidance
from dfkd.synthesis.losses import BatchNormLoss, CrossEntropy
from dfkd.synthesis.prompts import words_of
from dfkd.synthesis.sampler import ToLatent, predicted, sample
from dfkd.synthesis.teacher_precision import narrowed
from dfkd_engine.priors.adapters import Added, add_tokens
from dfkd_kernels.philox import philox_uniform

if TYPE_CHECKING:
    from dfkd.synthesis.pack import Pack
    from dfkd.synthesis.pipeline import GuidedPipeline

FOLDER = "class-words"
FIRST_ID = 3 << 60  # images of runs, and those of step trials, lie below
IMAGES = 16  # of a gradient step: as many as there are classes, at least these, at most a call
RATE = 0.02  # of Adam, in units of the words' root mean square: a word keeps the size of those around it
STEP_STREAM = 5 << 29  # of the random numbers that choose the denoising step


def word_of(label: int) -> str:
    """The word that stands for a class."""
    return f"<class-{label}>"


def require_words(pipe: "GuidedPipeline") -> None:
    """Raise UsageError for a prior or settings that no word can be learned for."""
    what, family = f"--class-words {pipe.config.sampling.class_words}", pipe.prior.family
    if len(family.readers) != 1:
        why = f"the prior, {family.name}, has {len(family.readers)} text encoders, and a word is learned for one"
        raise UsageError(what, why, "leave it out, or use a prior of Stable Diffusion 1 or 2")
    if "{label}" not in pipe.prompt:
        raise UsageError(what, f"the prompt {pipe.prompt!r} names no class", "use {label} in --prompt")
    if pipe.prior.dtype == torch.float16:
        raise UsageError(what, "its gradient passes the UNet, and float16 is too narrow for it", "use --dtype bf16")


def learn(pipe: "GuidedPipeline", out: Path, seed: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Learn the words, write them below `out`, use them, and return what a folder has on record of them.

    {"class_words": digest of the files, "class_word_losses": [before, after]}, means over the first and the last tenth
    of the steps. say: gets a line for people. Raises ShortMemory.
    """
    started, steps = time.perf_counter(), pipe.config.sampling.class_words
    reader = pipe.prior.family.readers[0]
    table = reader.network.get_input_embeddings().weight
    first = torch.stack([table[_own_tokens(reader, pipe.class_names[label])].float().mean(0) for label in pipe.classes])
    _write(out, pipe.classes, first)
    _add(pipe, out)
    words = first.clone().requires_grad_()
    optimiser = torch.optim.Adam([words], lr=RATE * float(first.square().mean().sqrt()))
    losses: list[float] = []
    for step in range(steps):
        _put(pipe, words)
        loss = _loss(pipe, words, seed, step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    _put(pipe, words)
    _write(out, pipe.classes, words.detach())
    tenth = max(steps // 10, 1)
    ends = [round(sum(part) / tenth, 4) for part in (losses[:tenth], losses[-tenth:])]
    spent = f"{steps} steps, {time.perf_counter() - started:.3g} s"
    say(f"class words: {len(pipe.classes)} learned in {spent}; their loss went from {ends[0]:.3g} to {ends[1]:.3g}")
    return {"class_words": _digest(out, pipe.classes), "class_word_losses": ends}


def take_up(pipe: "GuidedPipeline", out: Path, digest: str) -> None:
    """Use the words that a folder holds. Raises UsageError where they are not those on its record."""
    files = [_file(out, label) for label in pipe.classes]
    if not all(file.is_file() for file in files) or _digest(out, pipe.classes) != digest:
        why = "its images were made with words that are gone or changed"
        raise UsageError(f"{out / FOLDER} is not as it was", why, "restore it, or choose another --out")
    _add(pipe, out)


def _add(pipe: "GuidedPipeline", out: Path) -> None:
    """Add the words in the files to tokenizer and text encoder, and let prompts name classes by them."""
    files = [Added.inversion(str(_file(out, label))) for label in pipe.classes]
    pipeline = pipe.prior.family.pipeline(pipe.prior.denoiser)
    known = pipe.prior.family.readers[0].tokenizer.get_vocab()
    new = [file for file, label in zip(files, pipe.classes, strict=True) if word_of(label) not in known]
    add_tokens(pipeline, new, dict(pipe.prior.digests))  # the prior's own digests stay: a run's identity has them
    for label in pipe.classes:
        pipe.words[label] = word_of(label)
    stored = [safetensors.torch.load_file(_file(out, label))[word_of(label)] for label in pipe.classes]
    _put(pipe, torch.stack(stored))


@torch.no_grad()
def _put(pipe: "GuidedPipeline", words: Tensor) -> None:
    """Write words [C, D] into the text encoder, whose encoded prompts are then others."""
    reader = pipe.prior.family.readers[0]
    table = reader.network.get_input_embeddings().weight
    table.requires_grad_(False)
    table[_ids(pipe).to(table.device)] = words.detach().to(table)
    pipe.prior.family.to(pipe.device)  # which forgets those encoded before


def _loss(pipe: "GuidedPipeline", words: Tensor, seed: int, step: int) -> Tensor:
    """The loss of one gradient step, a scalar whose gradient reaches the words [C, D]."""
    config, count = pipe.config.guidance, min(max(len(pipe.classes), IMAGES), pipe.call_size)
    ids = FIRST_ID + step * count + torch.arange(count)
    classes = torch.tensor(pipe.classes)[(step * count + torch.arange(count)) % len(pipe.classes)]
    pack = pipe.pack(ids, seed, dict(zip(ids.tolist(), classes.tolist(), strict=True)))
    chosen = philox_uniform(seed, ids[:1], STEP_STREAM, (1,))
    i = int(chosen.item() * len(pipe.table))
    z, clip = pack.start(), pipe.table.clip
    rows = pipe.table.coefficients(z, pipe.cfg)
    z = sample(z, rows[:i], pack.denoise, _still, repeats=lambda i: 0, noise=pack.noise, clip=clip)
    weights = (config.cls_weight, config.bn_weight) if config.cls_weight or config.bn_weight else (1.0, 0.0)
    wanted = (CrossEntropy(weights[0]), BatchNormLoss(weights[1], "group", config.bn_loss))
    teacher = narrowed(pipe.teacher, pipe.config.compute.teacher_dtype)
    guidance = Guidance(pipe.guidance_decode, teacher, [loss for loss in wanted if loss.weight > 0])
    with torch.enable_grad(), calling("a step of --class-words"):
        with _in_place(pipe, words):
            pack.conditional = (_context(pipe, pack), *pack.conditional[1:])
        clean = predicted(z, pack.denoise(z, i), rows[i], clip)[1]
        values = guidance.values(pipe.guidance_decode(clean), pack.labels)
        return torch.stack([loss.weight * values[loss.name].mean() for loss in guidance.losses]).sum()


def _still(point: Tensor, i: int, to_latent: ToLatent | None = None) -> Tensor:
    """The guidance of an unguided trajectory."""
    return torch.zeros_like(point)


def _context(pipe: "GuidedPipeline", pack: "Pack") -> Tensor:
    """The text encoder's answers [B, L, D] to the prompts of a pack, differentiable; each prompt is encoded once."""
    prompts = list(dict.fromkeys(pack.prompts))
    (context,) = pipe.prior.family.readers[0].encode(prompts)
    found: Tensor = context[torch.tensor([prompts.index(prompt) for prompt in pack.prompts], device=context.device)]
    return found


@contextmanager
def _in_place(pipe: "GuidedPipeline", words: Tensor) -> Iterator[None]:
    """Inside, the words [C, D] are what their tokens are embedded as, so that gradients reach them."""
    tokens = _ids(pipe)

    def replaced(module: Any, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        match = given[0][..., None] == tokens.to(given[0].device)  # [B, L, C]
        own = match.to(embedded.dtype) @ words.to(embedded)
        return torch.where(match.any(-1, keepdim=True), own, embedded)

    handle = pipe.prior.family.readers[0].network.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()


def _ids(pipe: "GuidedPipeline") -> Tensor:
    """Token ids int64 [C] of the words."""
    tokenizer = pipe.prior.family.readers[0].tokenizer
    return torch.tensor(tokenizer.convert_tokens_to_ids([word_of(label) for label in pipe.classes]))


def _own_tokens(reader: Any, name: str) -> list[int]:
    """Token ids of a class's own words, without the ends."""
    ends = {reader.tokenizer.bos_token_id, reader.tokenizer.eos_token_id}
    tokens = reader.tokens(words_of(name))
    return [token for token in tokens if token not in ends] or tokens


def _write(out: Path, classes: Sequence[int], words: Tensor) -> None:
    make_writable(out / FOLDER)
    for label, word in zip(classes, words.detach().float().cpu(), strict=True):
        content = safetensors.torch.save({word_of(label): word.clone().contiguous()})
        replace_file(_file(out, label), lambda file, content=content: file.write(content))  # type: ignore[misc]


def _file(out: Path, label: int) -> Path:
    return out / FOLDER / f"class-{label}.safetensors"


def _digest(out: Path, classes: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(sha256(_file(out, label)) for label in classes).encode()).hexdigest()[:16]
