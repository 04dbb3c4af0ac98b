"""What a network costs to keep and to run, measured on one image on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfkd.teachers import Classifier

WARM, CALLS = 5, 40  # calls that are not timed, and those that are


@dataclass(frozen=True)
class Cost:
    """parameters: how many. bytes: of all weights and buffers, the size of model.safetensors but for its header.

    flops: of one image, a multiplication and an addition being two; convolutions, matrix products and attention alone.
    milliseconds: median time of one image. device: where, such as "cpu, 2 threads".
    """

    architecture: str
    parameters: int
    bytes: int
    flops: int
    milliseconds: float
    device: str


@torch.no_grad()
def costs(classifiers: Mapping[str, Classifier]) -> dict[str, Cost]:
    """Costs of classifiers in evaluation mode, where they are; timed in turns, so that all see the same machine."""
    images = {name: torch.zeros(1, 3, one.input_size, one.input_size, device=one.device)
              for name, one in classifiers.items()}  # fmt: skip
    flops = {name: _flops(one, images[name]) for name, one in classifiers.items()}
    names, turns = list(classifiers), []
    for _ in range(WARM + CALLS):
        turns.append({name: _seconds(classifiers[name], images[name]) for name in names})
        names.reverse()  # on a busy machine the first of a turn waits for the others' work
    return {
        name: Cost(
            architecture=one.architecture or type(one.module).__name__,
            parameters=sum(weight.numel() for weight in one.parameters()),
            bytes=sum(tensor.nbytes for tensor in one.state_dict().values()),
            flops=flops[name],
            milliseconds=1000 * median(turn[name] for turn in turns[WARM:]),
            device=_place(one.device),
        )
        for name, one in classifiers.items()
    }


def _flops(classifier: Classifier, image: torch.Tensor) -> int:
    # The counter knows no fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        classifier.logits(image)
    return int(counter.get_total_flops())


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"


def _seconds(classifier: Classifier, image: torch.Tensor) -> float:
    started = time.perf_counter()
    classifier.logits(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - started
