"""From a source to a prior's folder: a pipeline's, or what a checkpoint in one file borrows."""

from collections.abc import Callable
from pathlib import Path

from dfkd_engine.priors.folder import PriorFolder
from dfkd_engine.priors.single_file import SingleFile
from dfkd_engine.priors.source import PriorSource


def open_prior(source: str | Path | PriorSource, check: Callable[[PriorFolder], object] | None = None) -> PriorFolder:
    """The folder that `source` names, fetched where it is on the hub.

    check: called with the folder before any weights are fetched, to refuse it. Raises EngineError.
    """
    place = source if isinstance(source, PriorSource) else PriorSource(source)
    if place.single_file() is not None:
        return SingleFile.of(place, check)
    folder = PriorFolder.read(place.configs(), place.variant)
    if check is not None:
        check(folder)
    place.weights(folder.path, folder.networks)
    return folder
