"""Calls that ran out of memory, remembered beside the engines: the next run on such a device starts smaller."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfkd.cli.generate_options import GenerateOptions
from dfkd.synthesis.planning.calls import copies_of
from dfkd.synthesis.run import Synthesis
from dfkd_engine.architecture import architecture
from dfkd_engine.files import replace_text

REMEMBERED = "rows.json"  # in the engines' folder


class Remembered:
    """The most images a call, by network, for one synthesis on one device.

    The file is a list of entries, each naming what its number follows from. One that is lost or damaged costs another
    out-of-memory error and nothing else; `problem` says in words what is wrong with it, None: nothing.
    """

    def __init__(self, folder: Path, place: Mapping[str, Any]) -> None:
        self._file, self._place = folder / REMEMBERED, dict(place)
        self._entries, self.problem = _read(self._file)

    @classmethod
    def of(cls, options: GenerateOptions, synthesis: Synthesis) -> "Remembered":
        guidance = synthesis.guidance
        place = {
            "device": architecture(synthesis.device),
            "dtype": options.dtype,
            "prior": synthesis.prior.weights_digest,
            "latents": [*synthesis.latent_size],
            "rows_an_image": copies_of(synthesis),
            "teacher": [synthesis.teacher.architecture, synthesis.teacher.input_size],
            "gradient": options.gradient if guidance else None,
            "noise_edit": bool(guidance and options.noise_edit_steps),
            "adversarial": bool(guidance and guidance.student),
        }
        return cls(options.engines, place)

    def images(self) -> dict[str, int]:
        """By network."""
        return {
            entry["network"]: entry["images"]
            for entry in self._entries
            if {k: v for k, v in entry.items() if k not in ("network", "images")} == self._place
        }

    def keep(self, network: str, images: int) -> str | None:
        """Write down that a call of `network` holds `images` at most; returns why it could not be, None: it was."""
        entries, _ = _read(self._file)  # another run may have added some
        key = {**self._place, "network": network}
        others = [entry for entry in entries if {k: v for k, v in entry.items() if k != "images"} != key]
        self._entries = [*others, {**key, "images": images}]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._file, json.dumps(self._entries, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            return f"{self._file} cannot be written ({error.strerror or error})"
        return None


def _read(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError) as error:
        return [], f"{file} cannot be read ({error}): what it remembers is not used"
    whole = isinstance(found, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("network"), str)
        and type(images := entry.get("images")) is int
        and images > 0
        for entry in found
    )
    if not whole:
        return [], f"{file} is damaged: what it remembers is not used"
    return found, None
