"""Memory of a network's calls: measured by the row, and how many rows a call may therefore hold.

Bytes are counted as tensors come and go, so what autograd saves for a backward pass counts as long as it is kept. The
scratch memory of a single kernel and an allocator's rounding do not: leave room for them. The count follows from the
shapes alone, the same at every start and whatever else runs.

Convolutions, and the indices of most kernels, refuse tensors of more than 2^31 - 1 elements. The largest feature map of
one row follows from a network's config and from the size of the latents.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

ELEMENT_LIMIT = 2**31 - 1  # elements of one tensor
TOKENS = 77  # of CLIP's prompts: the text's maps are the largest where latents are a few cells wide

# Bytes grow in proportion to the rows but for constants of a few kilobytes, so two small calls tell.
_MEASURED_ROWS = (1, 2)
# torch's counter knows the fused attention of GPUs, not the CPU's.
_FLOP: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}

_WITHOUT_ATTENTION = ("DownBlock2D", "UpBlock2D", "UNetMidBlock2D")
_GEGLU = 8  # a transformer's feed-forward makes 4 times the width, twice: values and their gates
# diffusers' defaults of what an old config.json may leave out
_UNET_WIDTHS, _VAE_WIDTHS, _TINY_WIDTHS = (320, 640, 1280, 1280), (64,), (64, 64, 64, 64)
_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Footprint:
    """Needs of a call beside weights.

    fixed: bytes of any call. row: bytes of every row. elements: of one row's largest tensor. flop: of one row, those of
    convolutions, matrix products and attention, a multiplication and an addition being two.
    """

    fixed: int
    row: int
    elements: int
    flop: int = 0

    def bytes(self, rows: int) -> int:
        return self.fixed + rows * self.row

    def most_rows(self, memory: int) -> int:
        """The most rows that fit in `memory` bytes; may be 0."""
        return max(memory - self.fixed, 0) // max(self.row, 1)

    def with_(self, other: "Footprint") -> "Footprint":
        """The needs of whichever takes more, for calls that have one number of rows."""
        elements, flop = max(self.elements, other.elements), max(self.flop, other.flop)
        return Footprint(max(self.fixed, other.fixed), max(self.row, other.row), elements, flop)


@dataclass(frozen=True)
class CallPlan:
    """How rows are cut into calls of a network.

    rows   of a call; the last may be smaller
    calls  that hold all rows once
    bytes  at the peak of a call, without weights
    bound  name of the limit that decided; "" where one call holds it all
    """

    rows: int
    calls: int
    bytes: int
    bound: str


def footprint(call: Callable[[int], object], without_data: bool) -> Footprint:
    """The needs of `call(rows)`, which makes its inputs itself: they count.

    without_data: on tensors that have a shape and nothing else, which costs a millisecond an operation however large
        they are. A function that asks for values, or an operation that torch knows no shapes of, is run as it is.
    """
    if without_data:
        try:
            return _counted(call, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception:  # many kinds, by what the function asks for; its own faults come again below
            pass
    return _counted(call, None)


def weight_bytes(*networks: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def plan_calls(total: int, needs: Footprint, limits: Mapping[str, int]) -> CallPlan:
    """Cut `total` rows: as few calls as the limits allow, and those of about equal size.

    limits: name -> most rows. A limit below 1 counts as 1: with one row the device has the last word. Of equal ones the
        first decides.
    """
    bound, most = min(limits.items(), key=lambda limit: limit[1], default=("", total))
    rows = shared(total, most)
    return CallPlan(rows, -(-total // rows), needs.bytes(rows), bound if rows < total else "")


def shared(total: int, most: int) -> int:
    """Rows of a call, `most` at most, where as few calls as that allows share `total` rows."""
    calls = -(-total // max(most, 1))
    return -(-total // calls)


def halved(rows: int) -> int:
    """The next number of rows to try where a call of `rows` > 1 ran out of memory."""
    return rows // 2


def most_rows(elements: int) -> int:
    """The most rows of `elements` each that one tensor holds; 0 where one row is too large."""
    return ELEMENT_LIMIT // elements


def unet_elements(config: Mapping[str, Any], latent_size: tuple[int, int]) -> int:
    """Elements of the largest feature map of one row of a UNet2DConditionModel, given latents (h, w).

    config: content of unet/config.json. Exact for the blocks of Stable Diffusion 1 and 2; a block of another kind
    counts as if it had the widest of theirs. Attention's scores are no feature map: fused attention never holds them.
    """
    widths: tuple[int, ...] = tuple(config.get("block_out_channels", _UNET_WIDTHS))
    down, up = tuple(config.get("down_block_types", _DOWN)), tuple(config.get("up_block_types", _UP))
    sizes = _sizes(latent_size, len(widths))
    areas = [h * w for h, w in sizes]
    found = [max(int(config.get("in_channels", 4)), int(config.get("out_channels", 4)), widths[0]) * areas[0]]
    for i, (width, area, kind) in enumerate(zip(widths, areas, down, strict=True)):
        found += [max(width, widths[max(i - 1, 0)]) * area, _in_block(width, area, kind)]
    if config.get("downsample_padding", 1) == 0 and len(widths) > 1:  # its maps are padded by hand instead
        found += [width * (h + 1) * (w + 1) for width, (h, w) in zip(widths[:-1], sizes, strict=False)]
    if (middle := config.get("mid_block_type", "UNetMidBlock2DCrossAttn")) is not None:
        found.append(_in_block(widths[-1], areas[-1], middle))
    found.append(TOKENS * int(config.get("cross_attention_dim", 1280)))
    before = widths[-1]
    for i, kind in zip(reversed(range(len(widths))), up, strict=True):
        width, skipped = widths[i], max(widths[i], widths[max(i - 1, 0)])
        found += [(max(before, width) + skipped) * areas[i], _in_block(width, areas[i], kind)]  # beside what was kept
        before = width
    return max(found)


def decoder_elements(config: Mapping[str, Any], latent_size: tuple[int, int]) -> int:
    """Elements of the largest feature map of one row of an AutoencoderKL's or AutoencoderTiny's decoder.

    config: content of vae/config.json. The widest map is an enlarged one, which still has the channels from below.
    """
    h, w = latent_size
    latents = int(config.get("latent_channels", 4)) * h * w
    widths: tuple[int, ...]
    if "decoder_block_out_channels" in config or config.get("_class_name") == "AutoencoderTiny":
        widths = tuple(config.get("decoder_block_out_channels", _TINY_WIDTHS))
        factor = int(config.get("upsampling_scaling_factor", 2))
    else:
        widths, factor = tuple(reversed(config.get("block_out_channels", _VAE_WIDTHS))), 2
    areas = [h * w * factor ** (2 * i) for i in range(len(widths))]
    enlarged = [max(width, below) * area for width, below, area in zip(widths[1:], widths, areas[1:], strict=False)]
    image = int(config.get("out_channels", 3)) * areas[-1]
    return int(max([latents, widths[0] * areas[0], *enlarged, image]))


def _in_block(width: int, area: int, kind: str) -> int:
    return width * area if kind in _WITHOUT_ATTENTION else width * max(_GEGLU * area, TOKENS)


def _sizes(latent_size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """(h, w) of every level: each is half the one above, rounded up."""
    sizes = [latent_size]
    while len(sizes) < levels:
        h, w = sizes[-1]
        sizes.append((-(-h // 2), -(-w // 2)))
    return sizes


def _counted(call: Callable[[int], object], fake: FakeTensorMode | None) -> Footprint:
    found = []
    for rows in _MEASURED_ROWS:
        with fake or nullcontext(), _Live() as live:
            call(rows)
        found.append(live)
    (low, high), (few, many) = _MEASURED_ROWS, found
    row = -(-(many.peak - few.peak) // (high - low))
    return Footprint(max(few.peak - low * row, 0), row, -(-many.largest // high), many.flop // high)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """bytes of live storages that operations made, their peak, elements of the largest tensor made, and all FLOP."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = self.largest = self.flop = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _FLOP.get(func._overloadpacket):
            self.flop += int(formula(*args, **kwargs, out_val=out))
        if not any(result.alias_info for result in func._schema.returns):  # views and writes in place make no storage
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.largest = max(self.largest, tensor.numel())
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def freed(_: object) -> None:
            self.bytes -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
