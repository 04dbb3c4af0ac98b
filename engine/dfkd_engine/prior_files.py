"""Where a prior is, and what its files are: sources, configs, weights, digests and what is loaded from them.

Layout of the folder (what diffusers' `save_pretrained` of a pipeline writes), as far as its family has these parts:

    model_index.json                  class of the pipeline, and of every part
    unet/ or transformer/, vae/       config.json and diffusion_pytorch_model*.safetensors
    text_encoder/ text_encoder_2/ ..  config.json and model*.safetensors
    tokenizer/ tokenizer_2/ ...       tokenizer.json, or vocab.json and merges.txt
    scheduler/                        scheduler_config.json
    dfkd.json                         optional, ours: {"prompt": "the digit {label}", "labels": ["zero", "one", ...]}

A denoiser that is alone with its scheduler may lie in the folder itself, as `google/ddpm-cifar10-32` does.
Weights are read from safetensors only: a pickled file can run code. No safety checker is loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dfkd_engine import EMBEDDED
from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.files import sha256_once

FACTS = "dfkd.json"
DENOISERS = ("unet", "transformer")
_STEMS = {  # of the files of a network's weights
    **dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "model"),
}
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_LAYOUT = "a folder in the layout of a diffusers pipeline (unet/ or transformer/, vae/, text_encoder/, scheduler/, ...)"
_POINT = f"point to {_LAYOUT}"
FETCH = "fetch the prior again"


@dataclass(frozen=True)
class PriorFolder:
    """A prior's folder with the configs of its parts.

    configs: {part: content of its config.json}, of the networks that are there; "scheduler": of scheduler_config.json;
    "model_index" and "dfkd": of these files, {} where there is none.
    """

    path: Path
    configs: Mapping[str, dict[str, Any]]

    @classmethod
    def open(cls, source: str | Path) -> Self:
        """The folder that `source` names, fetched where it is on the hub. Raises EngineError."""
        return cls.read(_locate(source))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The configs of a folder. Raises EngineError: one is missing, or no JSON of an object."""
        flat = (path / "config.json").is_file() and not any((path / part).is_dir() for part in DENOISERS)
        homes = {part: path / part for part in _STEMS if (path / part).is_dir()} | ({"unet": path} if flat else {})
        configs = {part: _read_json(path, home / "config.json") for part, home in homes.items()}
        configs["scheduler"] = _read_json(path, _scheduler(path))
        for name, file in (("model_index", "model_index.json"), ("dfkd", FACTS)):
            configs[name] = _read_json(path, path / file) if (path / file).exists() else {}
        return cls(path, configs)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are there, by part."""
        return tuple(part for part in _STEMS if part in self.configs)

    def home(self, part: str) -> Path:
        """The folder of a part."""
        return self.path / part if (self.path / part).is_dir() else self.path

    def require(self, *parts: str) -> None:
        """Raise EngineError for a part that is not there, or has no files."""
        for part in parts:
            if part in _TOKENIZERS:
                self.tokenizer(part)
            elif part not in self.configs:
                raise EngineError(f"prior {self.path}", f"{part}/config.json is missing", f"a prior is {_LAYOUT}")
            else:
                self.weights(part)

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of one network, sorted. Raises EngineError where there are none."""
        stem, home = _STEMS[part], self.home(part)
        whole = home / f"{stem}.safetensors"
        files = [whole] if whole.is_file() else sorted(home.glob(f"{stem}-*-of-*.safetensors"))
        if not files:
            found = sorted(p.name for p in home.glob("*") if p.suffix != ".json")
            why = f"{part}/{stem}.safetensors is missing ({part}/ holds {', '.join(found) or 'no weights'})"
            todo = "save the pipeline again with diffusers' save_pretrained, in full precision and as safetensors"
            raise EngineError(f"prior {self.path}", why, todo)
        return files

    def tokenizer(self, part: str) -> list[Path]:
        """The files of a tokenizer. Raises EngineError where it has no vocabulary."""
        files = [path for path in (self.path / part).glob("*") if path.is_file()]
        names = {path.name for path in files}
        if not names & {"tokenizer.json", "spiece.model"} and not {"vocab.json", "merges.txt"} <= names:
            why = f"{part}/ has neither tokenizer.json nor vocab.json with merges.txt"
            raise EngineError(f"prior {self.path}", why, f"{FETCH}, its {part}/ included")
        return files

    def digests(self) -> dict[str, str]:
        """SHA-256 by part: the names and bytes of its weights and config, or of all files of a tokenizer.

        Files are read once a process. Raises EngineError where a network's weights or a tokenizer are missing.
        """
        parts = {part: [self.home(part) / "config.json", *self.weights(part)] for part in self.networks}
        parts |= {part: self.tokenizer(part) for part in _TOKENIZERS if (self.path / part).is_dir()}
        parts["scheduler"] = [_scheduler(self.path)]
        return {part: _digest(self.path, files) for part, files in parts.items()}

    def load(self, network: Any, part: str, **options: Any) -> Any:
        """A network with every weight from its files; diffusers and transformers alone would only warn.

        network: a class of theirs, loaded by `from_pretrained`. Raises EngineError.
        """
        home = self.home(part)
        try:
            loaded, info = network.from_pretrained(home, use_safetensors=True, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise EngineError(f"{home}", f"could not be loaded ({first_line(error)})", FETCH) from error
        absent = sorted(info["missing_keys"])
        if absent:
            why = f"{len(absent)} weights are not in its files, first {absent[0]}"
            raise EngineError(f"{home}", why, FETCH)
        return loaded

    def load_tokenizer(self, tokenizer: Any, part: str) -> Any:
        """A tokenizer, of a class of transformers. Raises EngineError."""
        try:
            return tokenizer.from_pretrained(self.path / part)
        except Exception as error:  # the tokenizers' library, which is not Python's, raises nothing narrower
            raise EngineError(f"{self.path / part}", f"could not be loaded ({first_line(error)})", FETCH) from error

    def facts(self) -> tuple[str | None, tuple[str, ...]]:
        """The prompt and the labels that the prior states of itself, (None, ()) where it states none.

        Raises EngineError: something else stands there.
        """
        prompt, labels = self.configs["dfkd"].get("prompt"), self.configs["dfkd"].get("labels", [])
        texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        if not isinstance(prompt, str | None) or not texts:
            why = "it does not describe a prior (prompt is a text, labels are a list of texts)"
            raise EngineError(str(self.path / FACTS), why, "correct it")
        return prompt, tuple(labels)


def local(source: str | Path) -> Path | None:
    """The folder of an embedded prior, or `source` itself; None for a hub id. Raises EngineError for none of them."""
    name, folder = str(source), Path(source).expanduser()
    if name in EMBEDDED:
        return EMBEDDED[name]
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = f", embedded are {', '.join(EMBEDDED)}" if EMBEDDED else ""
        raise EngineError(f"prior {name}", f"no such folder, and a hub id has the form owner/name{known}", _POINT)
    return None


def _locate(source: str | Path) -> Path:
    """The folder that `source` names: an embedded prior's, its own, or the hub's cached copy of the parts needed.

    Raises EngineError: no such folder, and no hub id that can be fetched.
    """
    if (folder := local(source)) is not None:
        return folder
    name = str(source)
    wanted = ["*.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
    wanted += [f"{part}/{stem}{end}" for part, stem in _STEMS.items() for end in (".safetensors*", "-*.safetensors")]
    wanted += ["diffusion_pytorch_model.safetensors"]
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's errors are all of these two kinds
        why = f"no folder of that name, and it could not be fetched from the Hugging Face hub ({first_line(error)})"
        todo = f"check the id and the network, or fetch it elsewhere and {_POINT}"
        raise EngineError(f"prior {name}", why, todo) from error


def _scheduler(path: Path) -> Path:
    """The scheduler's config: in its folder, or beside a denoiser that is alone with it."""
    flat = path / "scheduler_config.json"
    return flat if flat.is_file() else path / "scheduler" / "scheduler_config.json"


def _read_json(folder: Path, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises EngineError where it is missing or none."""
    if not path.is_file():
        raise EngineError(f"prior {folder}", f"{path.relative_to(folder)} is missing", f"a prior is {_LAYOUT}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it is a {type(found).__name__}")
        return found
    except (ValueError, TypeError) as error:
        raise EngineError(str(path), f"not JSON of an object ({error})", FETCH) from error


def _digest(folder: Path, files: Iterable[Path]) -> str:
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_once(path)}\n" for path in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
