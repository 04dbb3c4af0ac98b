"""The networks of a step by torch.compile."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd_engine.backends import get

Network = Callable[[Tensor], Tensor]

GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that replay CUDA graphs on a GPU


def check_compile(mode: str, device: torch.device) -> None:
    """Raise UsageError where this mode of DistillSettings.compile cannot work on the device."""
    if mode == "off":
        return
    if (why := get("inductor").unusable(device)) is not None:
        raise UsageError(f"--compile {mode}", why, "install it, or use --compile off")
    if device.type != "cuda" and mode == "reduce-overhead":
        raise UsageError(
            f"--compile {mode} on {device.type}", "it replays CUDA graphs", "use --compile default or --compile off"
        )


def compiled(network: nn.Module, mode: str, rows: int) -> Network:
    """The network for batches of ``rows`` images: itself where mode is "off", or compiled when it is first called.

    Any other batch, such as a run's last, goes through the network as it is: compiling for it would take longer than
    it does. Random layers draw as the network itself would, so results differ by rounding alone.
    Its first call raises UsageError where the compiler cannot take the network.
    """
    if mode == "off":
        return network
    options = {**torch._inductor.list_mode_options(mode), "fallback_random": True}
    fast = torch.compile(network, dynamic=False, options=options)

    def call(images: Tensor) -> Tensor:
        if len(images) != rows:
            return network(images)  # type: ignore[no-any-return]
        try:
            return fast(images)  # type: ignore[no-any-return]
        except torch._dynamo.exc.TorchDynamoException as error:
            why = str(error).strip().splitlines()[0]
            raise UsageError(f"--compile {mode} cannot take the network", why, "use --compile off") from error

    return call
