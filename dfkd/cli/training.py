"""What the commands that train have in common: the processes, the progress, and the result that is read back."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from dfkd.cli.parse import save_settings
from dfkd.cli.progress import progress, say
from dfkd.config import TrainConfig, TrainDecoderCommand, TrainPriorCommand, TrainTeacherCommand
from dfkd.logs import LOG

if TYPE_CHECKING:
    from dfkd.training.world import World


class Train(Protocol):
    """A training of the library, all but these arguments given."""

    def __call__(
        self,
        *,
        world: "World",
        progress: Callable[[float, float], object],
        say: Callable[[str], object],
        on_new: Callable[[], object],
    ) -> object: ...


def train_in_world(
    asked: TrainTeacherCommand | TrainPriorCommand | TrainDecoderCommand,
    config: TrainConfig,
    name: str,
    prepare: Callable[["World"], Train],
) -> dict[str, Any] | None:
    """Train in this process, or as one of torchrun's; the content of OUT/result.json, None in all but the first.

    prepare: called before anything is shown or written; it checks, loads, and gives the training.
    name: of the command, for OUT/settings.json.
    """
    from dfkd.training.folder import read_result
    from dfkd.training.world import join

    with join(config.compute.device) as world:
        train = prepare(world)
        speak = say if world.first else (lambda text: None)
        with progress("training", "img", world.first, asked.out / LOG) as draw:
            train(world=world, progress=draw, say=speak, on_new=partial(save_settings, asked, asked.out, name))
        return read_result(asked.out) if world.first else None
