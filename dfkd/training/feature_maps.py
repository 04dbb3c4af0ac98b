"""Where the feature maps of a classifier are, found in one forward pass.

A class activation map needs a network that ends in a global average of its last feature map and one linear layer.
Stages are where the resolution changes: of the resolutions before that of the last feature map the last three, each at
the last module of the trunk that has it; the last one counts where there are no three before it. For ResNets these are
layer1 to layer3. The zoo's are written down.
"""

import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.errors import UsageError
from dfkd.teachers.mobilenetv2 import MobileNetV2
from dfkd.teachers.resnet import CifarResNet, ImageNetResNet, ThinResNet
from dfkd.teachers.shufflenetv2 import ShuffleNetV2
from dfkd.teachers.vgg import VGG
from dfkd.teachers.wrn import WideResNet

STAGES = 3
_LAYERS = ("layer1", "layer2", "layer3")
ZOO: dict[type[nn.Module], tuple[str, ...]] = {
    CifarResNet: _LAYERS,
    ImageNetResNet: _LAYERS,
    ThinResNet: _LAYERS,
    ShuffleNetV2: _LAYERS,
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block0", "block1", "block2"),
    MobileNetV2: ("features.3", "features.6", "features.13"),
}


@dataclass(frozen=True)
class Head:
    """linear: the final layer; last: the module whose output is averaged for it, after a ReLU where relu is true."""

    linear: str
    last: str
    relu: bool


@dataclass(frozen=True)
class Places:
    """Modules of a network by name. head is None where no class activation map is wanted, stages are () where no
    Grad-CAM is."""

    head: Head | None
    stages: tuple[str, ...]

    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are needed."""
        last = (self.head.last,) if self.head is not None else ()
        return tuple(dict.fromkeys((*self.stages, *last)))


def find(
    network: nn.Module, size: int, who: str, cam: bool = True, grad_cams: bool = True, stages: Sequence[str] = ()
) -> Places:
    """The places of the maps that are wanted, from one forward pass in evaluation mode over images of that side.

    who: "teacher" or "student", for messages. stages: modules to take, instead of looking for them.
    Raises UsageError: no head to make class activation maps of, no three stages, or a module that is not there.
    """
    calls, logits = _calls(network, size)
    head = _head(calls, logits, who) if cam else None
    if not grad_cams:
        return Places(head, ())
    if stages:
        return Places(head, _named(network, calls, stages, who))
    return Places(head, ZOO.get(type(network)) or _by_resolution(network, calls, who))


@dataclass
class _Call:
    """One module's last call: the first tensor that went in, and what came out where that is a tensor."""

    module: nn.Module
    given: Tensor | None
    output: Tensor | None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the map that came out; None where it is none."""
        return _sides(self.output)


def _sides(value: Tensor | None) -> tuple[int, int] | None:
    return (value.shape[2], value.shape[3]) if value is not None and value.ndim == 4 else None


def _calls(network: nn.Module, size: int) -> tuple[dict[str, _Call], Tensor]:
    """The calls of every module by name, in the order in which they ended, and the logits."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(next(network.parameters()))
    calls: dict[str, _Call] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
            calls.pop(name, None)
            calls[name] = _Call(module, given, output if isinstance(output, Tensor) else None)

        return record

    training = {module: module.training for module in network.modules()}
    with ExitStack() as handles, torch.no_grad():
        for name, module in network.named_modules():
            if name:
                handles.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        try:
            return calls, network.eval()(images)
        finally:
            for module, was in training.items():
                module.training = was


def _head(calls: dict[str, _Call], logits: Tensor, who: str) -> Head:
    """The linear layer that gives the logits, and the map whose average it takes."""
    for name, call in reversed(calls.items()):
        if not isinstance(call.module, nn.Linear) or call.output is None or call.given is None:
            continue
        if call.output.shape != logits.shape or not torch.equal(call.output, logits):
            continue
        places = [
            (other.output.shape[2] * other.output.shape[3], not relu, order, place)
            for order, (place, other) in enumerate(calls.items())
            if other.output is not None and other.sides is not None
            for relu in (False, True)  # most networks apply the last ReLU as a function, outside of any module
            if _averages(other.output, relu, call.given)
        ]
        if places:  # the largest: what a pooling layer gives averages to itself
            _, plain, _, place = max(places)
            return Head(name, place, not plain)
    raise UsageError(
        f"the {who} has no class activation maps",
        "they need a network that ends in a global average of a feature map and one linear layer",
        "use --msarc-maps gradcam, or leave --msarc-weight at 0",
    )


def _averages(features: Tensor, relu: bool, pooled: Tensor) -> bool:
    """Is pooled [B, D] the average of features [B, D, h, w]?"""
    if features.shape[:2] != pooled.shape:
        return False
    average = (F.relu(features) if relu else features).float().mean((2, 3))
    tolerance = 1e-3 * float(pooled.float().abs().max())  # far above rounding, far below another map's distance
    return tolerance > 0 and float((average - pooled.float()).abs().max()) <= tolerance


def _by_resolution(network: nn.Module, calls: dict[str, _Call], who: str) -> tuple[str, ...]:
    places = {name: place for place, name in enumerate(calls)}
    ends: dict[tuple[int, int], str] = {}
    for name in sorted(_trunk(network, calls), key=places.__getitem__):
        if (sides := calls[name].sides) is not None:
            ends[sides] = name
    falling = [ends[sides] for sides in sorted(ends, key=lambda sides: -sides[0] * sides[1])]
    if falling != sorted(falling, key=places.__getitem__) or len(falling) < STAGES:
        listed = ", ".join(f"{height}x{width} ({name})" for (height, width), name in ends.items()) or "none"
        raise UsageError(
            f"the {who} has feature maps of {len(ends)} sizes: {listed}",
            f"Grad-CAMs are taken at {STAGES} stages, told by a resolution that falls",
            f"name them with --msarc-{who}-stages, or use --msarc-maps cam",
        )
    before = falling[:-1] if len(falling) > STAGES else falling
    return tuple(before[-STAGES:])


def _trunk(network: nn.Module, calls: dict[str, _Call], prefix: str = "") -> list[str]:
    """The outermost modules that change the resolution once or not at all; maps of one cell do not count."""
    found = []
    for child, module in network.named_children():
        name = prefix + child
        inside = {
            sides
            for other, call in calls.items()
            if other == name or other.startswith(name + ".")
            for sides in (_sides(call.given), call.sides)
            if sides is not None and sides != (1, 1)
        }
        whole = name in calls and calls[name].sides not in (None, (1, 1))
        found += [name] if whole and len(inside) <= 2 else _trunk(module, calls, name + ".")
    return found


def _named(network: nn.Module, calls: dict[str, _Call], stages: Sequence[str], who: str) -> tuple[str, ...]:
    for name in stages:
        if name not in calls or calls[name].sides is None:
            modules = [known for known, call in calls.items() if call.sides is not None]
            near = difflib.get_close_matches(name, modules, n=3) or modules[:3]
            exists = name in {known for known, _ in network.named_modules()}
            why = "it gives no feature map [B, K, h, w]" if exists else "there is no such module"
            raise UsageError(
                f"--msarc-{who}-stages names {name!r}", why, f"nearest that give one: {', '.join(near) or 'none'}"
            )
    return tuple(stages)
