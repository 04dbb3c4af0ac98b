"""What the kernels' files share: Triton where it is installed, precisions, memory orders, and checks of arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton as triton  # named twice: the kernels' files take it from here
    import triton.language

    tl = triton.language
except ModuleNotFoundError:  # a CPU-only installation needs the references alone
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, read as kernels are declared
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernel of this CPU tensor, and not the reference."""
    return INTERPRETED and x.device.type == "cpu"


def accumulated(*tensors: Tensor) -> torch.dtype:
    """The dtype that results of `tensors` are worked out in: float32, or float64 where one of them is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def require_triton() -> None:
    if triton is None:
        raise RuntimeError("Triton is not installed, and kernels=triton needs it. pip install triton")


def require(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Raise ValueError unless `tensor` is None, or of this shape, one of these dtypes, and on the device of `like`."""
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != like.device):
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: {found}; want {tuple(shape)} {wanted} on {like.device}")


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more, n >= 1."""
    return 1 << (n - 1).bit_length()


def is_nhwc(x: Tensor) -> bool:
    """Whether a map [B, C, ...] is dense in NHWC order: the channels of a pixel side by side in memory.

    A map that is dense in both orders, such as one of a single channel, counts as NCHW.
    """
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor, nhwc: bool) -> Tensor:
    """`x` [B, C, ...] dense with the channels of a pixel side by side, or as it is written: itself, or a copy."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if nhwc else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised map [B, C, ...] in the memory order of `x`; as it is written where `x` is not dense."""
    if is_nhwc(x):
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
