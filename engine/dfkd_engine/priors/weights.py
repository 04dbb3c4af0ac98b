"""The weight files of a network: which sets a folder holds, which set is taken, and whether its files are whole.

diffusion_pytorch_model.safetensors              a set in one file
diffusion_pytorch_model.safetensors.index.json   a set in several, which the index names
diffusion_pytorch_model.fp16.safetensors         a set of a variant, here "fp16"
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dfkd_engine.errors import EngineError, first_line

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
FETCH = "fetch the prior again"
_START = 200  # bytes of a file that tell what else it is


@dataclass(frozen=True)
class WeightSet:
    """One set of a network's weights. variant: None of the plain one. file: the only one, or the index of several."""

    variant: str | None
    file: str

    @property
    def sharded(self) -> bool:
        return self.file.endswith(".json")


def weight_sets(names: Iterable[str], stem: str, index_first: bool) -> Mapping[str | None, WeightSet]:
    """{variant: set} among the names of files in a network's folder.

    stem: of its weight files. index_first: whether the library that loads it takes an index before a whole file where
    both are there, as diffusers does and transformers does not.
    """
    whole = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    found: dict[str | None, WeightSet] = {}
    for pattern in (whole, index) if index_first else (index, whole):  # the later one counts
        for name in names:
            if match := pattern.fullmatch(name):
                found[match[1]] = WeightSet(match[1], name)
    return found


def chosen_set(sets: Mapping[str | None, WeightSet], variant: str | None) -> WeightSet | None:
    """The set of a variant, else the plain one, else, where no variant is asked for, the only one; None for none."""
    found = sets.get(variant) or sets.get(None)
    return next(iter(sets.values())) if found is None and variant is None and len(sets) == 1 else found


def check_variant(prior: str, found: Iterable[Mapping[str | None, WeightSet]], variant: str | None) -> None:
    """Raise EngineError for a variant that no network has. found: the sets of each."""
    known = {name for sets in found for name in sets}
    if variant is not None and variant not in known:
        others = ", ".join(sorted(name for name in known if name is not None)) or "none"
        raise EngineError(
            f"prior {prior}", f"no part has the variant {variant!r}; it has {others}", "correct --variant"
        )


def no_set(prior: str, part: str, stem: str, names: Iterable[str], variant: str | None) -> EngineError:
    """The error for a part without the set that is wanted; it says what is there instead. names: of the part's files.

    Raises nothing: the caller does.
    """
    names, sets = sorted(names), weight_sets(names, stem, True)
    if sets:
        known = ", ".join(str(name) for name in sorted(sets, key=str))
        asked = "plain" if variant is None else f"{variant} or plain"
        why = f"{part}/ has no {asked} {stem}.safetensors, but the variants {known}"
        return EngineError(f"prior {prior}", why, "choose one of them with --variant")
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        why = f"{part}/ has its weights only in {pickled[0]}, a pickled file, which can run code as it is read"
        return EngineError(f"prior {prior}", why, f"where you trust it, convert it once: {conversion(prior)}")
    loose = [name for name in names if re.fullmatch(rf"{stem}.*-of-\d+\.safetensors", name)]
    if loose:
        why = f"{part}/{stem}.safetensors.index.json is missing, which says what is in {loose[0]} and the others"
        return EngineError(f"prior {prior}", why, FETCH)
    held = ", ".join(name for name in names if not name.endswith(".json")) or "no weights"
    todo = f"{FETCH}, or save the pipeline again with diffusers' save_pretrained, as safetensors"
    return EngineError(f"prior {prior}", f"{part}/{stem}.safetensors is missing ({part}/ holds {held})", todo)


def conversion(prior: str, single_file: str = "") -> str:
    """The command that writes a pipeline anew, as safetensors, to the folder NEW.

    single_file: the pipeline's class, where it is a checkpoint in one file.
    """
    load = f"DiffusionPipeline.from_pretrained({prior!r}, safety_checker=None)"
    if single_file:
        load = f"{single_file}.from_single_file({prior!r})"
    kind = load.partition(".")[0]
    return f"python -c \"from diffusers import {kind}; {load}.save_pretrained('NEW')\", and give NEW to --prior"


def shards(index: Path) -> list[Path]:
    """The files that an index names, sorted. Raises EngineError: it is no index, or one of them is missing."""
    files = [index.parent / name for name in shard_names(index)]
    if missing := [file.name for file in files if not file.is_file()]:
        why = f"{len(missing)} of the {len(files)} files that it names are missing, first {missing[0]}"
        raise EngineError(str(index), why, FETCH)
    return files


def shard_names(index: Path) -> list[str]:
    """Names of the files beside an index that it names, sorted. Raises EngineError: it is no index."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise EngineError(str(index), "it has no weight_map of weights and their files", FETCH)
    names = sorted(set(table.values()))
    if away := [name for name in names if Path(name).name != name]:
        raise EngineError(str(index), f"{away[0]!r} is not a file beside it", FETCH)
    return names


def check_whole(path: Path) -> None:
    """Raise EngineError for a weight file that is not a whole safetensors file, by its header: no weight is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        why = other_content(path) or f"it is damaged, or only a part of it was fetched ({first_line(error)})"
        raise EngineError(str(path), why, "fetch it again") from error


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises EngineError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        why = other_content(path) or f"not JSON of an object ({first_line(error)})"
        raise EngineError(str(path), why, "fetch it again, or correct it") from error
    if not isinstance(found, dict):
        why = f"not JSON of an object (it is a {type(found).__name__})"
        raise EngineError(str(path), why, "fetch it again, or correct it")
    return found


def other_content(path: Path) -> str:
    """What a file is instead, where a download went wrong; "" where that is not seen."""
    with open(path, "rb") as file:
        start = file.read(_START).lstrip()
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer, and the file that it stands for was not fetched (git lfs pull does)"
    if start[:1] == b"<":
        return "it is a web page, not the file"
    return ""
