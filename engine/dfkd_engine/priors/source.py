"""Where a prior is: one that is embedded, a folder, a checkpoint in one file, or the hub's cache."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dfkd_engine import EMBEDDED
from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.priors.weights import WeightSet, check_variant, chosen_set, no_set, shard_names, weight_sets

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
STEMS = {  # of the names of a network's weight files
    **dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(TEXT_ENCODERS, "model"),
}
LAYOUT = "a folder in the layout of a diffusers pipeline (unet/ or transformer/, vae/, text_encoder/, scheduler/, ...)"
_POINT = f"point to {LAYOUT}"

# What is fetched before the weights: all that tells which of them are needed, and whether they can be used at all.
_SCHEDULERS = ["scheduler_config.json", "scheduler/scheduler_config.json"]
_CONFIGS = ["model_index.json", "dfkd.json", "config.json", *_SCHEDULERS]
_CONFIGS += [f"{part}/config.json" for part in STEMS]
_CONFIGS += [f"{part}/{stem}.safetensors.index*.json" for part, stem in STEMS.items()]
_CONFIGS += [f"{STEMS['unet']}.safetensors.index*.json", *(f"{part}/*" for part in TOKENIZERS)]


@dataclass(frozen=True)
class PriorSource:
    """What a caller says of a prior's place.

    name: an embedded prior's, a folder, a file, or a hub id ("owner/name"). revision: of a hub id: branch, tag or
    commit. variant: of weights that lie in several sets side by side. offline: fetch nothing. config: of a file, the
    folder or hub id of a pipeline that has configs and tokenizer for it; None: the hub id that diffusers knows for it.

    Raises EngineError: a revision of what is no hub id, a config for what is no file.
    """

    name: str | Path
    revision: str | None = None
    variant: str | None = None
    offline: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        found = self.local()
        if self.revision is not None and found is not None:
            raise EngineError(f"revision {self.revision!r}", f"{self.name} is no hub id", "leave the revision out")
        if self.config is not None and (found is None or found.is_dir()):
            raise EngineError(f"prior config {self.config!r}", f"{self.name} is no single file", "leave it out")

    def local(self) -> Path | None:
        """The embedded prior's folder, or the folder or file itself; None for a hub id. Raises EngineError."""
        name, path = str(self.name), Path(self.name).expanduser()
        if name in EMBEDDED:
            return EMBEDDED[name]
        if path.exists():
            return path
        away = isinstance(self.name, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
        if away or path.suffix in (".safetensors", ".ckpt"):
            known = f", embedded are {', '.join(EMBEDDED)}" if EMBEDDED else ""
            why = f"no such folder or file, and a hub id has the form owner/name{known}"
            raise EngineError(f"prior {name}", why, _POINT)
        return None

    def single_file(self) -> Path | None:
        """The file of a checkpoint in one file, None for other sources."""
        found = self.local()
        return None if found is None or found.is_dir() else found

    def here(self) -> bool:
        """Whether all of it is on this machine, and nothing is to be fetched."""
        if self.single_file():
            return self.config is not None and PriorSource(self.config).local() is not None
        return self.local() is not None

    def configs(self) -> Path:
        """The folder with the configs: its own, or the hub's cached copy. Raises EngineError."""
        if (found := self.local()) is not None:
            return found
        from huggingface_hub import snapshot_download

        name, revision, offline = str(self.name), self.revision, self._offline()
        # Offline the cache may lack what nobody needs, such as another variant's index: what is there is judged later.
        wanted = _SCHEDULERS if offline else _CONFIGS
        return self._fetched(
            lambda: snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=offline)
        )

    def weights(self, folder: Path, parts: tuple[str, ...]) -> None:
        """Fetch the weights of these networks into `folder`, which `configs` gave; one set of each. Raises EngineError.

        Where the hub cannot be asked, what is in the cache is taken, with a warning.
        """
        if self.local() is not None or self._offline():
            return
        from huggingface_hub import HfApi, snapshot_download

        commit = folder.name  # a snapshot's folder is called by it
        try:
            names = HfApi().list_repo_files(str(self.name), revision=commit)
        except Exception as error:  # of the hub's library, or of whichever client it goes through
            why = f"the hub cannot be asked ({first_line(error)}): its copy in the cache is taken"
            warnings.warn(f"prior {self.name}: {why}", stacklevel=2)
            return
        check_variant(str(self.name), (self._sets(part, names) for part in parts), self.variant)
        wanted = [name for part in parts for name in self._wanted(folder, part, names)]
        self._fetched(lambda: snapshot_download(str(self.name), revision=commit, allow_patterns=wanted))

    def _wanted(self, folder: Path, part: str, names: list[str]) -> list[str]:
        """Names in a repository of the weights of one part. Raises EngineError where it has none that can be read."""
        own = _names_of(part, names)
        if (found := chosen_set(self._sets(part, names), self.variant)) is None:
            raise no_set(str(self.name), part, STEMS[part], own, self.variant)
        if not found.sharded:
            return [own[found.file]]
        index = folder / own[found.file]
        return [own[name] for name in shard_names(index) if name in own]

    def _sets(self, part: str, names: list[str]) -> Mapping[str | None, WeightSet]:
        return weight_sets(_names_of(part, names), STEMS[part], part not in TEXT_ENCODERS)

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.offline or bool(constants.HF_HUB_OFFLINE)

    def _fetched(self, fetch: Callable[[], str]) -> Path:
        try:
            return Path(fetch())
        except Exception as error:  # of the hub's library, or of whichever client it goes through
            which = f"prior {self.name}" + (f" at revision {self.revision}" if self.revision else "")
            if self._offline():
                why = "it is not in the local cache, and nothing may be fetched (--offline, or HF_HUB_OFFLINE)"
                raise EngineError(which, why, f"fetch it once with a network, or {_POINT}") from error
            why = f"no folder of that name, and it could not be fetched from the Hugging Face hub ({first_line(error)})"
            todo = f"check the id and the network (hf auth login, where it is not public), or {_POINT}"
            raise EngineError(which, why, todo) from error


def _names_of(part: str, names: list[str]) -> dict[str, str]:
    """{name: path} of the files of one part of a repository, which may be a denoiser that is alone in it."""
    folder = part if f"{part}/config.json" in names else ""
    return {name.rpartition("/")[2]: name for name in names if name.rpartition("/")[0] == folder}
