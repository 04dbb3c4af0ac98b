"""What a prior's files are: configs, weights, digests and what is loaded from them.

Layout of the folder (what diffusers' `save_pretrained` of a pipeline writes), as far as its family has these parts:

    model_index.json                  class of the pipeline, and of every part
    unet/ or transformer/, vae/       config.json and diffusion_pytorch_model*.safetensors
    text_encoder/ text_encoder_2/ ..  config.json and model*.safetensors
    tokenizer/ tokenizer_2/ ...       tokenizer.json, or vocab.json and merges.txt
    scheduler/                        scheduler_config.json
    dfkd.json                         optional, ours: {"prompt": "the digit {label}", "labels": ["zero", "one", ...]}

A denoiser that is alone with its scheduler may lie in the folder itself, as `google/ddpm-cifar10-32` does, and so may
a VAE that is alone, as `stabilityai/sd-vae-ft-mse` does.
Weights are read from safetensors only: a pickled file can run code. No safety checker is loaded.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.files import sha256_once
from dfkd_engine.priors.configs import (
    check_diffusers_config,
    check_keys,
    check_tokenizer_config,
    check_transformers_config,
    failure,
    fits,
    make_diffusers,
    make_transformers,
    refused,
)
from dfkd_engine.priors.source import DENOISERS, LAYOUT, STEMS, TEXT_ENCODERS, TOKENIZERS
from dfkd_engine.priors.weights import (
    FETCH,
    WeightSet,
    check_variant,
    check_whole,
    chosen_set,
    no_set,
    other_content,
    read_json,
    shards,
    weight_sets,
)

__all__ = ["DENOISERS", "FACTS", "FETCH", "PriorFolder"]

FACTS = "dfkd.json"
_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = (".json", ".txt", ".model")  # what a tokenizer is read from


@dataclass(frozen=True)
class PriorFolder:
    """A prior's folder with the configs of its parts.

    configs: {part: content of its config.json}, of the networks that are there; "scheduler": of scheduler_config.json,
    {} of a VAE alone; "model_index" and "dfkd": of these files, {} where there is none.
    variant: of the weights, where a network has several sets side by side.
    """

    path: Path
    configs: Mapping[str, dict[str, Any]]
    variant: str | None = None

    @classmethod
    def read(cls, path: Path, variant: str | None = None) -> Self:
        """The configs of a folder. Raises EngineError: one is missing, or no JSON of an object."""
        homes = {part: path / part for part in STEMS if (path / part).is_dir()}
        configs = {part: _config(path, home / "config.json") for part, home in homes.items()}
        if (path / "config.json").is_file() and not any(part in homes for part in DENOISERS):
            alone = read_json(path / "config.json")
            configs["vae" if str(alone.get("_class_name")).startswith("Autoencoder") else "unet"] = alone
        no_model = "unet" not in configs and "transformer" not in configs  # a VAE alone has no scheduler
        configs["scheduler"] = {} if no_model and not _scheduler(path).exists() else _config(path, _scheduler(path))
        for name, file in (("model_index", "model_index.json"), ("dfkd", FACTS)):
            configs[name] = read_json(path / file) if (path / file).exists() else {}
        return cls(path, configs, variant)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are there, by part."""
        return tuple(part for part in STEMS if part in self.configs)

    def home(self, part: str) -> Path:
        """The folder of a part."""
        return self.path / part if (self.path / part).is_dir() else self.path

    def require(self, *parts: str) -> None:
        """Raise EngineError for a part that is not there, or has no files."""
        check_variant(str(self.path), map(self._sets, self.networks), self.variant)
        for part in parts:
            if part in TOKENIZERS:
                self.tokenizer(part)
            elif part not in self.configs:
                raise EngineError(f"prior {self.path}", f"{part}/config.json is missing", f"a prior is {LAYOUT}")
            else:
                self.weights(part)
                if (self.home(part) / _ADAPTER).exists():  # transformers would put it in without a word
                    why = f"{part}/{_ADAPTER} lies beside its weights, and would change them"
                    raise EngineError(f"prior {self.path}", why, "merge the adapter into them, or take it away")

    def weights(self, part: str) -> list[Path]:
        """The safetensors files of one network that are loaded, sorted, and of several their index before them.

        Raises EngineError: there are none, or one is missing or damaged as far as its header tells.
        """
        chosen, home = self._chosen(part), self.home(part)
        files = shards(home / chosen.file) if chosen.sharded else [home / chosen.file]
        for file in files:
            check_whole(file)
        return [home / chosen.file, *files] if chosen.sharded else files

    def tokenizer(self, part: str) -> list[Path]:
        """The files that a tokenizer is read from. Raises EngineError: it has no vocabulary, or one is damaged."""
        files = [path for path in (self.path / part).glob("*") if path.suffix in _TOKENIZER_FILES and path.is_file()]
        names = {path.name for path in files}
        if not names & {"tokenizer.json", "spiece.model"} and not {"vocab.json", "merges.txt"} <= names:
            why = f"{part}/ has neither tokenizer.json nor vocab.json with merges.txt"
            raise EngineError(f"prior {self.path}", why, f"{FETCH}, its {part}/ included")
        for path in files:
            if path.suffix == ".json":
                check_tokenizer_config(f"prior {self.path}: {part}/{path.name}", read_json(path))
            elif content := other_content(path):
                raise EngineError(str(path), content, "fetch it again")
        return files

    def digests(self, networks: Iterable[str] | None = None) -> dict[str, str]:
        """SHA-256 by part: the names and bytes of the files that it is loaded from, a network's config included.

        networks: those that are in use, with the tokenizers of their texts; None: all that are there. Files are read
        once a process. Raises EngineError where a network's weights or a tokenizer are missing.
        """
        used = tuple(self.networks if networks is None else networks)
        parts = {part: [self.home(part) / "config.json", *self.weights(part)] for part in used}
        texts = {part.replace("text_encoder", "tokenizer") for part in used if part in TEXT_ENCODERS}
        parts |= {part: self.tokenizer(part) for part in TOKENIZERS if part in texts}
        parts["scheduler"] = [_scheduler(self.path)]
        return {part: _digest(self.path, files) for part, files in parts.items()}

    def check(self, part: str) -> None:
        """Raise EngineError, naming key and value, where a network's class cannot take the values of its config.

        Of a class that diffusers or transformers do not have nothing is said: families know which they want.
        """
        import diffusers
        import transformers

        config, where = self.configs[part], f"prior {self.path}: {part}/config.json"
        if part not in TEXT_ENCODERS:
            named = config.get("_class_name")
            if isinstance(named, str) and (network := getattr(diffusers, named, None)) is not None:
                check_diffusers_config(where, network, config)
            return
        architectures = config.get("architectures")
        if not isinstance(config.get("model_type", ""), str):
            raise refused(where, "model_type", config["model_type"], "it is a text")
        if architectures is not None and not fits(architectures, list[str]):
            raise refused(where, "architectures", architectures, "it names the network's class, in a list of texts")
        kind = getattr(getattr(transformers, (architectures or [""])[0], None), "config_class", None)
        if kind is not None and config.get("model_type", kind.model_type) == kind.model_type:
            check_transformers_config(where, kind, config)

    def load(self, network: Any, part: str, **options: Any) -> Any:
        """A network with every weight from its files, and no other; diffusers and transformers alone would only warn.

        network: a class of theirs, loaded by `from_pretrained`. Raises EngineError: its config makes no network, or
        one whose weights are not those of its files.
        """
        home, variant = self.home(part), self._chosen(part).variant
        if variant != self.variant:
            text = f"its {variant or 'plain'} weights are taken, it has no {self.variant or 'plain'} ones"
            warnings.warn(f"prior {self.path}: {part}: {text}", stacklevel=2)
        given: dict[str, Any] = {"use_safetensors": True, "variant": variant}
        given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # these are told below
        try:
            loaded, info = network.from_pretrained(home, **given, **options)
        except Exception as error:  # whatever a network's own code meets in a config that it was not made for
            make = partial(make_transformers if part in TEXT_ENCODERS else make_diffusers, network)
            raise failure(f"prior {self.path}: {part}/config.json", self.configs[part], error, make) from error
        self._complete(part, network.__name__, info)
        return loaded

    def _complete(self, part: str, name: str, info: Mapping[str, Any]) -> None:
        """Raise EngineError for weights that are missing, left over or of another shape, by a loading info."""
        home, todo = self.home(part), f"use the config and the weights of one network: {FETCH}"
        if odd := sorted(info["mismatched_keys"]):
            weight, file, config = odd[0]
            why = f"{len(odd)} weights have other shapes than its config.json says, first {weight}: {list(file)} in the"
            raise EngineError(f"{home}", f"{why} file, {list(config)} by the config", todo)
        for fact, keys in (("are not in its files", "missing_keys"), (f"are none of a {name}'s", "unexpected_keys")):
            if odd := sorted(info[keys]):
                raise EngineError(f"{home}", f"{len(odd)} weights {fact}, first {odd[0]}", todo)

    def load_tokenizer(self, tokenizer: Any, part: str) -> Any:
        """A tokenizer, of a class of transformers. Raises EngineError."""
        try:
            return tokenizer.from_pretrained(self.path / part)
        except Exception as error:  # the tokenizers' library, which is not Python's, raises nothing narrower
            raise EngineError(f"{self.path / part}", f"could not be loaded ({first_line(error)})", FETCH) from error

    def _sets(self, part: str) -> Mapping[str | None, WeightSet]:
        names = (path.name for path in self.home(part).iterdir())
        return weight_sets(list(names), STEMS[part], part not in TEXT_ENCODERS)

    def _chosen(self, part: str) -> WeightSet:
        """The set of weights that is loaded. Raises EngineError where there is none to choose."""
        names = [path.name for path in self.home(part).iterdir()]
        if (chosen := chosen_set(self._sets(part), self.variant)) is None:
            raise no_set(str(self.path), part, STEMS[part], names, self.variant)
        return chosen

    def facts(self) -> tuple[str | None, tuple[str, ...]]:
        """The prompt and the labels that the prior states of itself, (None, ()) where it states none.

        Raises EngineError: something else stands there. Warns of keys that are not known.
        """
        config, where = self.configs["dfkd"], f"prior {self.path}: {FACTS}"
        check_keys(where, "a prior", config, ("prompt", "labels", "null_class", "patch_size"))
        prompt, labels = config.get("prompt"), config.get("labels", [])
        if not isinstance(prompt, str | None):
            raise refused(where, "prompt", prompt, "it is a text, with {label} in the class's place")
        if not fits(labels, list[str]) or not all(label.strip() for label in labels):
            raise refused(where, "labels", labels, "they are a list of texts, none of them empty")
        return prompt, tuple(labels)


def _scheduler(path: Path) -> Path:
    """The scheduler's config: in its folder, or beside a denoiser that is alone with it."""
    flat = path / "scheduler_config.json"
    return flat if flat.is_file() else path / "scheduler" / "scheduler_config.json"


def _config(folder: Path, path: Path) -> dict[str, Any]:
    """The object in a config. Raises EngineError where it is missing or none."""
    if not path.is_file():
        raise EngineError(f"prior {folder}", f"{path.relative_to(folder)} is missing", f"a prior is {LAYOUT}")
    return read_json(path)


def _digest(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names, within the folder, and bytes of files; a checkpoint that lies elsewhere has any name."""
    lines = [f"{_name(folder, path)} {sha256_once(path)}\n" for path in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else "checkpoint"
