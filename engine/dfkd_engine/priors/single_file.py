"""Stable Diffusion 1 and 2 in one file, as they were first published: all networks' weights under their first names.

    model.diffusion_model.*     the UNet
    first_stage_model.*         the VAE
    cond_stage_model.*          the text encoder

Such a file has no configs, no tokenizer and no schedule: they are taken from a pipeline of the same kind, of which no
weights are needed. diffusers' own converters give the weights the names that its networks have now.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.priors.configs import failure, make_diffusers, make_transformers
from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.source import TEXT_ENCODERS, PriorSource
from dfkd_engine.priors.weights import check_whole, conversion

_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_PIPELINES = {"xl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}  # by the start of diffusers' type
_GIVE = "give --prior-config, a folder or hub id of a pipeline of the same kind, whose weights are not needed"


@dataclass(frozen=True)
class SingleFile(PriorFolder):
    """A checkpoint in one file. path, configs: of the pipeline that it borrows all but weights from. file: its own."""

    file: Path = Path()

    @classmethod
    def of(cls, source: PriorSource, check: Callable[[PriorFolder], object] | None = None) -> Self:
        """The checkpoint that a source names, with configs fetched where they are on the hub. Raises EngineError."""
        file = source.single_file()
        assert file is not None  # or it is no source for this class
        kind, config = check_file(file), source.config
        if source.variant is not None:
            raise EngineError(f"variant {source.variant!r}", f"{file} is one set of weights", "leave it out")
        if config is None:
            config = _known_config(file, kind)
            warnings.warn(f"prior {file}: its configs, tokenizer and schedule are those of {config}", stacklevel=2)
        try:
            place = PriorSource(config, offline=source.offline)
            folder = place.configs()
        except EngineError as error:
            raise EngineError(f"prior {file}: its configs: {error.what}", error.why, _GIVE) from error
        read = PriorFolder.read(folder)
        found = cls(read.path, read.configs, None, file)
        if check is not None:
            check(found)
        return found

    def weights(self, part: str) -> list[Path]:
        if part not in _PREFIXES:
            why = f"a checkpoint of Stable Diffusion 1 or 2 has no {part}"
            raise EngineError(f"prior {self.file}: {self.path} has a {part}", why, _GIVE)
        return [self.file]

    def require(self, *parts: str) -> None:
        for part in parts:
            if part.startswith("tokenizer"):
                self.tokenizer(part)
            elif part not in self.configs:
                raise EngineError(f"prior {self.file}", f"{self.path} has no {part}/config.json", _GIVE)

    def load(self, network: Any, part: str, **options: Any) -> Any:
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
        from safetensors.torch import load_file

        weights = {name: w for name, w in load_file(self.file).items() if name.startswith(_PREFIXES[part])}
        where = {"config": str(self.path), "subfolder": part, "local_files_only": True}
        dtype = options.get("dtype", options.get("torch_dtype"))
        try:
            if part in TEXT_ENCODERS:
                loaded = create_diffusers_clip_model_from_ldm(network, dict(weights), torch_dtype=dtype, **where)
            else:
                loaded = network.from_single_file(dict(weights), torch_dtype=dtype, **where)
        except Exception as error:  # of the converters or the network: the file is not what the config says
            text = first_line(error)
            if isinstance(error, NotImplementedError):  # of a weight that nothing was read for
                text = "some of its weights are not in the file"
            fault = f"prior {self.file}: its {part}, with the config of {self.path / part}"
            if isinstance(error, ValueError | NotImplementedError | KeyError):
                raise EngineError(fault, f"it cannot be loaded ({text[:300]})", _GIVE) from error
            make = make_transformers if part in TEXT_ENCODERS else make_diffusers
            raise failure(fault, self.configs[part], error, lambda config: make(network, config)) from error
        self._every_weight(part, loaded, weights)
        return loaded

    def _every_weight(self, part: str, loaded: Any, weights: Iterable[str]) -> None:
        """Raise EngineError where a network has weights that the file lacks, or the file some that it has no use for.

        What an open_clip text encoder (Stable Diffusion 2) has beyond its last used layer is left out by design.
        """
        what = f"prior {self.file}: its {part}, with the config of {self.path / part}"
        own = loaded.state_dict()
        if absent := [name for name, weight in own.items() if weight.is_meta]:
            raise EngineError(what, f"{len(absent)} weights are not in the file, first {absent[0]}", _GIVE)
        given = [name for name in weights if not name.endswith("position_ids")]
        if len(given) != len(own) and not any(name.startswith("cond_stage_model.model.") for name in given):
            raise EngineError(what, f"the file has {len(given)} weights for it, the network {len(own)}", _GIVE)


def check_file(file: Path) -> str:
    """The kind of a checkpoint, "v1" or "v2". Raises EngineError: damaged, pickled, or of another layout."""
    if file.suffix != ".safetensors":
        why = "it is no folder, and no safetensors file; a pickled one can run code as it is read"
        raise EngineError(f"prior {file}", why, f"where you trust it, {_convert(file, 'StableDiffusionPipeline')}")
    check_whole(file)
    shapes = _shapes(file)
    kind = _kind(shapes)
    for start, pipeline in _PIPELINES.items():
        if kind.startswith(start):
            raise EngineError(f"prior {file}", f"it is a {kind} checkpoint in one file", _convert(file, pipeline))
    missing = [prefix for prefix in _PREFIXES.values() if not any(name.startswith(prefix) for name in shapes)]
    if missing or kind not in ("v1", "v2"):
        lacks = f"it has no {missing[0]}*" if missing else f"diffusers takes it for {kind}"
        why = f"no checkpoint of Stable Diffusion 1 or 2: {lacks}, its first weight is {min(shapes, default='none')}"
        todo = "give the folder of a pipeline; LoRA weights and single networks are no prior"
        raise EngineError(f"prior {file}", why, todo)
    return kind


def _convert(file: Path, pipeline: str) -> str:
    return f"convert it once: {conversion(str(file), pipeline)}"


def _shapes(file: Path) -> dict[str, Any]:
    """{name: tensor without memory} of a file's weights, from its header."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()  # it is no dictionary, and cannot be iterated itself
        return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}


def _kind(shapes: dict[str, Any]) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind: str = infer_diffusers_model_type(shapes)
    return kind


def _known_config(file: Path, kind: str) -> str:
    """The hub id whose configs diffusers takes for a kind. Raises EngineError where the file does not say enough."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    if kind == "v2":
        why = "it does not say whether it predicts noise or velocities: both kinds of Stable Diffusion 2 look alike"
        raise EngineError(f"prior {file}", why, _GIVE)
    name: str = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return name
