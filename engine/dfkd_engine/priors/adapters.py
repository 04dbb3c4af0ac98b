"""What may be added to a prior's networks when it is loaded: LoRA weights, and tokens of textual inversion.

Both are read and put in by diffusers' own loaders, from safetensors only. LoRA weights (arXiv 2106.09685) are fused,
W + scale B A, so that what runs, is traced and compiled is a plain network. A token of textual inversion (arXiv
2208.01618) is a word of the prompt that one or several learned embeddings stand for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.files import sha256_once
from dfkd_engine.priors.weights import check_whole

_LORA_NAME = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights calls it
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # networks that LoRA weights may be for


@dataclass(frozen=True)
class Added:
    """A file to add, and what was written behind its colon: a scale or a token, "" for none."""

    file: Path
    own: str

    @classmethod
    def lora(cls, text: str) -> Self:
        """FILE_OR_FOLDER[:SCALE]. Raises EngineError: no such file, a damaged one, or a scale that is no number."""
        path, own = _split(text)
        if own and not _is_number(own):
            raise EngineError(
                f"LoRA {text}", f"its scale {own!r} is no number", "write FILE:SCALE, such as x.safetensors:0.8"
            )
        return cls(_found(path, "LoRA"), own)

    @classmethod
    def inversion(cls, text: str) -> Self:
        """FILE[:TOKEN]. Raises EngineError: there is no such file, or it is damaged."""
        path, own = _split(text)
        return cls(_found(path, "textual inversion"), own)

    @property
    def scale(self) -> float:
        return float(self.own or 1.0)

    @property
    def digest(self) -> str:
        """SHA-256 of the file and of what was written behind it."""
        return hashlib.sha256(f"{sha256_once(self.file)} {self.own or '-'}".encode()).hexdigest()


def fuse_loras(pipeline: Any, loras: Sequence[Added], digests: dict[str, str]) -> None:
    """Fuse LoRA weights into the networks of a diffusers pipeline, one file after another.

    digests: of the prior, by part; what a file has changed is digested anew, and the file itself enters as "lora".
    Raises EngineError: no LoRA weights, or weights that fit none of the networks' layers.
    """
    for lora in loras:
        where: dict[str, Any] = {
            "pretrained_model_name_or_path_or_dict": str(lora.file.parent),
            "weight_name": lora.file.name,
        }
        where |= {"use_safetensors": True, "local_files_only": True}
        if hasattr(pipeline, "unet"):
            where["unet_config"] = pipeline.unet.config  # by which layers of other formats are told
        networks = {part: network for part in _PARTS if (network := getattr(pipeline, part, None)) is not None}
        todo = "use LoRA weights that were trained for this prior's networks"
        if any("dora_scale" in name for name in _names(lora.file)):
            why = "its weights are of DoRA, whose scales diffusers' loader leaves out"
            raise EngineError(f"LoRA {lora.file}", why, "use LoRA weights")
        try:
            weights = pipeline.lora_state_dict(**where)
            pipeline.load_lora_weights(**{name: own for name, own in where.items() if name != "unet_config"})
            took = {part: _tensors(network) for part, network in networks.items()}
            pipeline.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
            pipeline.unload_lora_weights()
        except Exception as error:  # whatever the loaders meet in a file that is none of theirs
            raise EngineError(f"LoRA {lora.file}", f"it could not be taken ({first_line(error)})", todo) from error
        given = sum(_is_weight(name) for name in (weights[0] if isinstance(weights, tuple) else weights))
        if not given or sum(took.values()) != given:
            why = f"{given - sum(took.values())} of its {given} weights are for layers that the prior does not have"
            raise EngineError(f"LoRA {lora.file}", why if given else "it holds no LoRA weights", todo)
        for part in (part for part, count in took.items() if count):
            digests[part] = _joined(digests[part], lora.digest)
        digests["lora"] = _joined(digests.get("lora", ""), lora.digest)


def add_tokens(pipeline: Any, inversions: Sequence[Added], digests: dict[str, str]) -> tuple[str, ...]:
    """Add tokens of textual inversion to the tokenizers and text encoders of a diffusers pipeline; returns the tokens.

    digests: as of `fuse_loras`; a file enters as "textual_inversion". A file for two text encoders has the entries
    clip_l and clip_g, and its token is written behind its name. Raises EngineError.
    """
    if inversions and not hasattr(pipeline, "load_textual_inversion"):
        what = f"tokens of textual inversion cannot be added to a {type(pipeline).__name__}"
        raise EngineError(what, "diffusers has no loader for it", "leave them out")
    endings = ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)
    added = []
    for inversion in inversions:
        token, embeddings = _embeddings(inversion, len(endings))
        for ending, embedding in zip(endings, embeddings, strict=True):
            parts = {part: f"{part}{ending}" for part in ("text_encoder", "tokenizer")}
            own = {part: getattr(pipeline, named) for part, named in parts.items()}
            try:
                pipeline.load_textual_inversion({"emb_params": embedding}, token=token, **own)
            except Exception as error:  # as above
                what, why = f"textual inversion {inversion.file}", f"it could not be taken ({first_line(error)})"
                todo = "use one that was trained for this prior's text encoder"
                if "already" in why:  # the tokenizer has the word
                    todo = f"give it another word: {inversion.file}:<another-word>"
                raise EngineError(what, why, todo) from error
            for part in parts.values():
                digests[part] = _joined(digests[part], inversion.digest)
        digests["textual_inversion"] = _joined(digests.get("textual_inversion", ""), inversion.digest)
        added.append(token)
    return tuple(added)


def _embeddings(inversion: Added, encoders: int) -> tuple[str, list[Tensor]]:
    """The token, and its embeddings [n, D] for each of the text encoders. Raises EngineError."""
    from safetensors.torch import load_file

    what, state = f"textual inversion {inversion.file}", load_file(inversion.file)
    wanted = ("clip_l", "clip_g") if encoders == 2 else tuple(state)[:1]
    if set(wanted) != set(state):
        rule = "clip_l and clip_g, for two text encoders" if encoders == 2 else "one embedding, for one text encoder"
        why = f"it holds {', '.join(sorted(state)[:5])}, and this prior takes {rule}"
        raise EngineError(what, why, "use one that was trained for it")
    token = inversion.own or (wanted[0] if encoders == 1 and wanted[0] != "emb_params" else "")
    if not token:
        raise EngineError(what, "it does not say its token", f"write it behind the file: {inversion.file}:TOKEN")
    return token, [state[name] for name in wanted]


def _split(text: str) -> tuple[Path, str]:
    path, _, own = text.rpartition(":")
    if not path or Path(text).expanduser().exists():
        path, own = text, ""
    return Path(path).expanduser(), own


def _found(path: Path, what: str) -> Path:
    """The file itself, or the one of a folder. Raises EngineError."""
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        own = [file for file in inside if file.name == _LORA_NAME] or inside
        if len(own) != 1:
            why = f"the folder holds {len(own)} safetensors files, and it has to be one"
            raise EngineError(f"{what} {path}", why, "name the file")
        path = own[0]
    if not path.is_file():
        raise EngineError(f"{what} {path}", "there is no such file or folder", "correct the path")
    if path.suffix != ".safetensors":
        why = f"weights are read from safetensors only, which a {path.suffix or 'file without ending'} is not"
        raise EngineError(f"{what} {path}", why, "save it as safetensors")
    check_whole(path)
    return path


def _names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _is_weight(name: str) -> bool:
    return "lora" in name and not name.endswith("alpha")


def _tensors(network: nn.Module) -> int:
    """How many LoRA tensors a network holds, before they are fused."""
    return sum("lora_" in name for name in network.state_dict())


def _joined(*digests: str) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
