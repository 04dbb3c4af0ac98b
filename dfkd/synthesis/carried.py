"""What a method has learned from its calls so far, kept beside the shards, for images that follow from those before.

OUT/state-00003.safetensors     as it was once shard 3 was made; the manifest has its hash in that shard's entry

The file is written before its shard is counted and the one before it goes after that, so that a run that is killed at
any moment finds the state that belongs to its last shard.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

import safetensors.torch
from torch import Tensor

from dfkd.data import ShardFolder
from dfkd.errors import UsageError
from dfkd.files import replace_file, sha256
from dfkd.runtime import Rank
from dfkd.synthesis.synthesizer import Synthesizer


class Learning(Protocol):
    """The hooks of a synthesizer that learns (`Synthesizer`)."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> object: ...


def learns(synthesizer: object) -> TypeGuard[Learning]:
    """Whether a synthesizer's images follow from those before them, as of one that has `state_dict`."""
    return hasattr(synthesizer, "state_dict")  # also where it is that of one inside (`Around`)


def require_one_process(synthesizer: Synthesizer, rank: Rank) -> None:
    """Raise UsageError where several processes would share out images of which each follows from those before."""
    name = synthesizer.name
    if rank.count > 1 and learns(synthesizer):
        why = "each of its images follows from those before, so that shards cannot be shared out"
        raise UsageError(f"method {name} in {rank.count} processes", why, "start it without torchrun")


class Carried:
    """The state of a method from shard to shard of its folder."""

    def __init__(self, method: Learning, folder: ShardFolder) -> None:
        self._method, self._folder = method, folder

    def to_make(self, missing: Sequence[int]) -> list[int]:
        """The shards to make where these are missing: from one whose state before is known to the last of the folder.

        A shard that is whole behind one that is missing is made again: the state after it is that of its own run.
        """
        if not missing:
            return []
        start = missing[0]
        while start and not self._known(start - 1):
            start -= 1
        return list(range(start, self._folder.layout.shard_count()))

    def take_up(self, index: int) -> None:
        """Put the method into the state before shard `index`; before the first it is as it was made."""
        if index:
            self._method.load_state_dict(safetensors.torch.load_file(self._file(index - 1)))

    def save(self, index: int) -> dict[str, str]:
        """Write the state after shard `index`, whose entry in the manifest is to have what is returned."""
        content = safetensors.torch.save(self.copy())
        replace_file(self._file(index), lambda file: file.write(content))
        return {"state": sha256(self._file(index))}

    def forget_before(self, index: int) -> None:
        """Remove all states but that after shard `index`, whose entry the manifest has by now."""
        for file in self._folder.path.glob("state-*.safetensors"):
            if file != self._file(index):
                file.unlink()

    def copy(self) -> dict[str, Tensor]:
        """The state as it is now, in main memory, whatever the method does next."""
        return {name: value.detach().cpu().clone().contiguous() for name, value in self._method.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put the method back into a state that `copy` gave."""
        self._method.load_state_dict(state)

    def _known(self, index: int) -> bool:
        wanted, file = self._folder.entry(index).get("state"), self._file(index)
        return wanted is not None and file.is_file() and sha256(file) == wanted

    def _file(self, index: int) -> Path:
        return self._folder.path / f"state-{index:05d}.safetensors"
