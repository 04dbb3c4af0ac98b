"""What a run does when a call finds too little memory: smaller calls, said and remembered, or an end in words."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dfkd.cli.generate_options import GenerateOptions
from dfkd.compiled.choose import Choice
from dfkd.compiled.requests import CALL_UNIT, in_group
from dfkd.errors import UsageError
from dfkd.synthesis.planning.remembered import Remembered
from dfkd.synthesis.run import Rows
from dfkd_engine.planner import halved, shared


@dataclass(frozen=True)
class Smaller:
    """For `synthesise`: the rows to go on with.

    build_command: the command that builds the engines of a run with these options.
    """

    options: GenerateOptions
    choices: Sequence[Choice]
    remembered: Remembered
    build_command: Callable[[GenerateOptions], str]

    def __call__(self, network: str, rows: Rows, why: str) -> Rows:
        """The rows to go on with after a call of `network` ran out of memory.

        Raises UsageError: a call had one image only; or a group's gradient is an engine of the whole group, whose parts
        need others, and a folder's images come from the engines that it was begun with.
        """
        options, before = self.options, int(getattr(rows, network))
        if before <= 1:
            todo = "take a lower --size, --dtype bf16 or fp16, a smaller --group, or a device with more memory"
            raise UsageError(f"a {network} call of one image runs out of memory", why, todo)
        images = shared(options.group, halved(before, CALL_UNIT), CALL_UNIT)
        unkept = self.remembered.keep(network, images)
        if network == "gradient" and before >= options.group and in_group(options):
            self._refuse_engines(images, why)
        kept = f"not remembered: {unkept}" if unkept else "remembered for the next run"
        print(
            f"{network}: out of memory with {before} images a call; the group is sampled again with {images} ({kept})",
            file=sys.stderr,
        )
        return replace(rows, **{network: images})

    def _refuse_engines(self, images: int, why: str) -> None:
        fused = [c for c in self.choices if c.key and c.network in ("gradient", "pixel_gradient")]
        if fused:
            command = self.build_command(replace(self.options, micro_batch=images))
            raise UsageError(
                f"the {fused[0].backend} engine of the {fused[0].network} takes a whole group, and {self.options.group}"
                " images run out of memory",
                why,
                f"build the engines of its parts ({command}) and run again with another --out: this folder keeps the"
                f" engines that it was begun with; the next run takes {images} images a call",
            )
