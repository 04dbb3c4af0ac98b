"""Which group normalisation a UNet or a VAE runs with where it runs eagerly or by Inductor: torch's, or the kernel's.

`dfkd_kernels.group_norm_silu` takes the SiLU behind a layer into the same launch. Which layers have one behind them is
read off the blocks that diffusers builds such networks from, by their structure:

    a residual block   norm1 -> nonlinearity -> conv1 -> norm2 -> nonlinearity, and nonlinearity -> time_emb_proj
    a network's end    conv_norm_out -> conv_act

Of any other block a group norm is taken alone, and the activation left where it is. Parameters and their names stay
what they were: digests, weights and layers' paths know nothing of the change.

Torch's own has a slow kernel among those for CPUs, for small channels-last maps in half precision; `PlanarGroupNorm`
goes around it, by the memory order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_engine.errors import EngineError
from dfkd_kernels.group_norm_silu import backward_operation, forward_operation, group_norm_silu

NAMES = ("torch", "triton")
# What a graph holds in the place of such layers. They run in this process: no ONNX file, and no compiler but torch's
# own, knows them.
KERNELS = frozenset({forward_operation, backward_operation})
SMALL = 1024  # pixels of a map, as torch's GroupNormKernel.cpp has it
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Swapped:
    """How many group norms a network has, how many the kernel runs, and how many of them with their SiLU."""

    layers: int
    fused: int
    with_silu: int


class KernelGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by the kernel, with the SiLU behind it where `silu` says so."""

    silu: bool = False

    @classmethod
    def of(cls, layer: nn.Module, silu: bool) -> Self:
        made: Self = _sharing(cls, layer)
        made.silu = silu
        return made

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class PlanarGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of a network in half precision, by way of planes [B, C, H, W] where that is quicker.

    On a CPU torch has two kernels for channels-last maps. The one for maps below SMALL pixels takes, in half precision,
    up to nine times as long as the one for planes; copies to that order and back take less than it does. Results differ
    by rounding. A tensor that is traced stays as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        small = x.dim() == 4 and x.shape[2] * x.shape[3] < SMALL
        if type(x) is not Tensor or not small or x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


class SiluLinear(nn.Linear):
    """A linear layer with the SiLU that stands before it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(x), self.weight, self.bias)


class Folded(nn.Module):
    """In the place of a SiLU that the layers around it have taken."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._held = (activation,)  # no child of this one: the network's layers are those that run

    @property
    def activation(self) -> nn.Module:
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        return x


def set_group_norms(network: nn.Module, name: str) -> Swapped:
    """Let every group norm of a frozen network in evaluation mode run by "torch" or by "triton", the kernel.

    A network that has them already is changed over; "torch" gives back the layers that it was made of. Raises
    EngineError: another name, or weights that want a gradient.
    """
    if name not in NAMES:
        raise EngineError(f"the group norm {name!r} is unknown", f"known are {', '.join(NAMES)}", "choose one of them")
    _restore(network)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    if name == "torch":
        _replace(network, lambda layer: _sharing(PlanarGroupNorm, layer) if layer.weight.dtype in _HALF else layer)
        return Swapped(len(layers), 0, 0)
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        why = "the kernel gives the gradient in a layer's input alone"
        raise EngineError("the group norm triton cannot be set", why, "call requires_grad_(False) on the network")
    fused = 0
    for block in list(network.modules()):
        fused += _fold(block)
    _replace(network, lambda layer: KernelGroupNorm.of(layer, silu=False))
    taken = sum(isinstance(layer, KernelGroupNorm) for layer in network.modules())
    return Swapped(len(layers), taken, fused)


def group_norms(network: nn.Module) -> Swapped:
    """What runs the group norms of a network now."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.GroupNorm)]
    taken = [layer for layer in layers if isinstance(layer, KernelGroupNorm)]
    return Swapped(len(layers), len(taken), sum(layer.silu for layer in taken))


@contextmanager
def running(networks: tuple[nn.Module, ...], name: str) -> Iterator[None]:
    """The networks with group norms of this name, and afterwards as they were before."""
    before = ["triton" if group_norms(network).fused else "torch" for network in networks]
    try:
        for network in networks:
            set_group_norms(network, name)
        yield
    finally:
        for network, own in zip(networks, before, strict=True):
            set_group_norms(network, own)


def _fold(block: nn.Module) -> int:
    """Take the SiLUs of a known block into its layers; how many group norms have one now."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    # the very classes: another's forward may use the same names in another order
    if type(block) is ResnetBlock2D:
        return _fold_residual(block)
    if type(block) in (Decoder, Encoder, UNet2DConditionModel):
        norm: Any = getattr(block, "conv_norm_out", None)
        activation: Any = getattr(block, "conv_act", None)
        if _plain(norm) and type(activation) is nn.SiLU:
            block.conv_norm_out, block.conv_act = KernelGroupNorm.of(norm, silu=True), Folded(activation)
            return 1
    return 0


def _fold_residual(block: Any) -> int:
    first, second, activation, times = block.norm1, block.norm2, block.nonlinearity, block.time_emb_proj
    projected = times is not None and not block.skip_time_act
    # scale_shift acts between norm2 and its SiLU
    if block.time_embedding_norm == "scale_shift" or type(activation) is not nn.SiLU:
        return 0
    if not _plain(first) or not _plain(second) or (projected and type(times) is not nn.Linear):
        return 0
    block.norm1, block.norm2 = KernelGroupNorm.of(first, silu=True), KernelGroupNorm.of(second, silu=True)
    if projected:
        block.time_emb_proj = _sharing(SiluLinear, times)
    block.nonlinearity = Folded(activation)
    return 2


def _replace(network: nn.Module, by: Callable[[Any], nn.Module]) -> None:
    """Put another layer in the place of every plain group norm."""
    for block in list(network.modules()):
        for place, layer in list(block.named_children()):
            if _plain(layer):
                setattr(block, place, by(layer))


def _restore(network: nn.Module) -> None:
    for block in list(network.modules()):
        for place, layer in list(block.named_children()):
            if isinstance(layer, KernelGroupNorm | PlanarGroupNorm):
                setattr(block, place, _sharing(nn.GroupNorm, layer))
            elif isinstance(layer, SiluLinear):
                setattr(block, place, _sharing(nn.Linear, layer))
            elif isinstance(layer, Folded):
                setattr(block, place, layer.activation)


def _plain(layer: object) -> bool:
    return type(layer) is nn.GroupNorm and layer.affine


def _sharing(kind: Any, layer: nn.Module) -> Any:
    """A layer of another kind of the same class family, made of the same parameters, hooks and settings."""
    made = kind.__new__(kind)
    made.__dict__.update(layer.__dict__)
    made.__dict__.pop("silu", None)
    return made
