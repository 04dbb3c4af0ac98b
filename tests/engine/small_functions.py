"""Small networks of every family that graphs are made of, functions of them, and exact errors against float64."""

import functools
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.teachers import build
from dfkd_engine.spec import TensorSpec

CLASSES = 5


class ValueAndGradient:
    """(f(x), the gradient of <f(x), w> in x) with fixed weights w of either sign, for a function or a network f."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.f(leaf)
            weights = torch.linspace(-1, 1.5, value[0].numel(), device=x.device).view(value.shape[1:])
            (gradient,) = torch.autograd.grad((value * weights.to(value.dtype)).sum(), leaf)
        return value.detach(), gradient


class PixelGradient:
    """(gradient, losses...) in images [B, 3, H, W] with labels [B]: cross-entropy, and BatchNorm statistics if any.

    m1, m2 are the moments of a layer's input over the whole batch; L_bn = sum |m1 - mean| + |m2 - var - mean^2|.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaf = images.detach().requires_grad_()
        seen: list[tuple[Any, Tensor]] = []
        handles = [layer.register_forward_pre_hook(lambda layer, x: seen.append((layer, *x))) for layer in self.layers]
        with torch.enable_grad():
            cls = F.cross_entropy(self.module(leaf), labels, reduction="none")
            bn = [_distance(layer, x) for layer, x in seen]
            (gradient,) = torch.autograd.grad(cls.sum() + sum(bn), leaf)
        for handle in handles:
            handle.remove()
        losses = [cls.detach()] + ([sum(bn).detach().expand(images.shape[0])] if bn else [])
        return gradient, *losses


def _distance(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    m1, m2 = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
    mean, var = layer.running_mean, layer.running_var
    return (m1 - mean).norm() + (m2 - var - mean.square()).norm()


def frozen(network: nn.Module) -> nn.Module:
    """In evaluation mode, with BatchNorm statistics as training would leave them: away from zero and one."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 1.5)
                layer.bias.data.normal_(0, 0.2)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _transformers(kind: str, **config: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **config)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


TEACHERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # name -> side in pixels, network
    "thin residual": (16, lambda: build("resnet8_half", CLASSES)),
    "bottlenecks": (
        33,  # odd: the last windows of the strided layers stop short of the edge
        lambda: _transformers("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]),
    ),
    "convnext": (32, lambda: _transformers("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
    "vit": (
        32,
        lambda: _transformers(
            "ViT",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        ),
    ),
}


def teacher(name: str) -> tuple[int, nn.Module]:
    size, make = TEACHERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return size, frozen(make())


def images(size: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("images", (None, 3, size, size), "float32"), TensorSpec("labels", (None,), "int64"))


def examples(specs: Sequence[TensorSpec], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Normal numbers, or integers below CLASSES."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(CLASSES, spec.sizes(batch), generator=generator)
        if spec.dtype == "int64"
        else torch.randn(spec.sizes(batch), generator=generator).to(getattr(torch, spec.dtype))
        for spec in specs
    )


def in_float64(function: Any) -> Any:
    """The function with float64 copies of its networks and inputs: what errors are measured against."""
    if isinstance(function, functools.partial):
        wide = functools.partial(in_float64(function.func), *function.args, **function.keywords)
    else:
        wide = deepcopy(function)
    _widen(wide, set())
    return lambda *args: wide(*(x.double() if x.is_floating_point() else x for x in args))


def _widen(value: Any, seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        value.double()
    elif isinstance(value, (list, tuple)):
        for part in value:
            _widen(part, seen)
    elif hasattr(value, "__self__"):
        _widen(value.__self__, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for part in vars(value).values():
            _widen(part, seen)


def errors(got: Tensor, want: Tensor) -> Tensor:
    """||got - want|| / ||want|| of each sample [B]."""
    got, want = got.double().reshape(len(got), -1), want.double().reshape(len(want), -1)
    return (got - want).norm(dim=1) / want.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


class Attention(nn.Module):
    """PyTorch's attention as diffusers and transformers call it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)
