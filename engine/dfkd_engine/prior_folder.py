"""A Stable Diffusion pipeline on disk: where it lies, its configs and its weight files. No torch is needed to look.

Layout of the folder (what diffusers' `StableDiffusionPipeline.save_pretrained` writes):

    unet/ vae/           config.json and diffusion_pytorch_model*.safetensors
    text_encoder/        config.json and model*.safetensors
    tokenizer/           tokenizer.json, or vocab.json and merges.txt
    scheduler/           scheduler_config.json

Weights are read from safetensors only: a pickled file can run code.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_engine.errors import EngineError

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}


class PriorError(EngineError):
    """A prior that cannot be used, found before any sampling."""


def locate(source: str | Path) -> Path:
    """The folder itself, or the hub's cached copy of the parts that are needed."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    todo = "Point to a folder in Stable Diffusion layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/)"
    name = str(source)
    if isinstance(source, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise PriorError(f"prior {name}", "no such folder, and a hub id has the form owner/name", todo)
    wanted = ["*/config.json", "scheduler/*.json", "tokenizer/*"]
    wanted += [f"{part}/{stem}.safetensors*" for part, stem in WEIGHTS.items()]
    wanted += [f"{part}/{stem}-*-of-*.safetensors" for part, stem in WEIGHTS.items()]
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's errors are all of these two kinds
        first_line = str(error).strip().splitlines()[0].rstrip(".")
        why = f"no folder of that name, and it could not be fetched from the Hugging Face hub ({first_line})"
        raise PriorError(
            f"prior {name}", why, f"Check the id and the network, or fetch it elsewhere. {todo}"
        ) from error


def read_config(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = folder / part / name
    if not path.is_file():
        raise PriorError(
            f"prior {folder}",
            f"{part}/{name} is missing",
            "A prior is a folder in Stable Diffusion layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/",
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise PriorError(str(path), f"not JSON ({error})", "Fetch the prior again") from error
    return dict(config)


def weight_files(folder: Path, part: str, stem: str) -> list[Path]:
    """The safetensors files of one network, sorted."""
    whole = folder / part / f"{stem}.safetensors"
    files = [whole] if whole.is_file() else sorted((folder / part).glob(f"{stem}-*-of-*.safetensors"))
    if not files:
        found = sorted(p.name for p in (folder / part).glob("*") if p.suffix != ".json")
        raise PriorError(
            f"prior {folder}",
            f"{part}/{stem}.safetensors is missing ({part}/ holds {', '.join(found) or 'no weights'})",
            "Save the pipeline again with diffusers' save_pretrained, in full precision and as safetensors",
        )
    return files


def digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 over the names, relative to the prior, and the bytes of the files."""
    total = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()
