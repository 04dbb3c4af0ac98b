"""How long a synthesis takes on GPUs that are not here: rooflines of its network calls, by the GPUs' data sheets.

Rows of a call are planned for their memory. The work of every call is counted operation by operation (engine/work.py),
which gives two times that cannot be beaten, with everything fused into convolutions, products and attention, and
eagerly. The forecast is the first at the shares of the ceilings that compiled diffusion models reach, with launches,
which networks as small as the demo's spend their time on, and with the writing of the images. Images are shared out
group by group; nothing is exchanged between GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dfkd.cli.generate_options import GenerateOptions
from dfkd.synthesis.planning.calls import network_calls
from dfkd.synthesis.planning.data_sheets import DataSheet
from dfkd.synthesis.planning.plan import Plan, make_plan
from dfkd.synthesis.planning.seconds import calls_of, counts, write_seconds
from dfkd.synthesis.run import Synthesis
from dfkd_engine.work import Work, work

# Of the peak: MLPerf's SDXL in 8 bits on an H100 58 %; diffusers with torch.compile, Stable Diffusion 1.5 on an A100
# 39 %.
REACHED = (0.6, 0.4)
LAUNCH = 5e-6  # seconds from one operation to the next where Python launches them, roughly; a CUDA graph takes less


@dataclass(frozen=True)
class Elsewhere:
    """devices: of one sheet. work: of a group, by network. write: seconds an image, on this machine's CPU."""

    devices: int
    sheet: DataSheet
    plan: Plan
    work: Mapping[str, Work]
    write: float

    def floor(self, images: int, fused: bool) -> float:
        """Seconds at the ceilings of the data sheet, of so many images, without launches and writing."""
        peaks, bandwidth = self.sheet.flops, self.sheet.bandwidth
        return self._groups(images) * sum(part.seconds(peaks, bandwidth, fused) for part in self.work.values())

    def predicted(self, images: int) -> tuple[float, float]:
        """Seconds of the forecast, of compiled networks: from, to."""
        launches = self._groups(images) * sum(part.launches(fused=True) for part in self.work.values())
        rest = LAUNCH * launches + self.write_seconds(images)
        low, high = (self.floor(images, True) / share + rest for share in REACHED)
        return low, high

    def write_seconds(self, images: int) -> float:
        """Every device's process writes its own."""
        return self.write * -(-images // self.devices)

    def _groups(self, images: int) -> int:
        return -(-images // (self.plan.group * self.devices))


def predict_elsewhere(options: GenerateOptions, synthesis: Synthesis, devices: int, sheet: DataSheet) -> Elsewhere:
    """synthesis: on eager networks."""
    plan = make_plan(options, synthesis, {}, sheet=sheet)
    write = write_seconds(synthesis, options.image_format)
    return Elsewhere(devices, sheet, plan, work_of_group(synthesis, plan), write)


def work_of_group(synthesis: Synthesis, plan: Plan) -> dict[str, Work]:
    """By network, of all its calls for one group; synthesis: on eager networks."""
    parts = plan.calls["gradient"].calls if "gradient" in plan.calls else 1
    calls, found = network_calls(synthesis, parts), {}
    for name, number in counts(synthesis, plan).items():
        rows, share = calls_of(name, plan)
        found[name] = work(calls[name], rows).scaled(number / share)
    return found
