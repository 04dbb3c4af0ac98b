"""How many rows a network call holds, by arithmetic alone: no torch is needed.

Convolutions, and the indices of most kernels, refuse tensors of more than 2^31 - 1 elements. The largest feature map of
one row follows from a network's config and from the size of the latents; bytes are measured (engine/footprint.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ELEMENT_LIMIT = 2**31 - 1  # elements of one tensor
TOKENS = 77  # of CLIP's prompts: the text's maps are the largest where latents are a few cells wide

_WITHOUT_ATTENTION = ("DownBlock2D", "UpBlock2D", "UNetMidBlock2D")
_GEGLU = 8  # a transformer's feed-forward makes 4 times the width, twice: values and their gates
# diffusers' defaults of what an old config.json may leave out
_UNET_WIDTHS, _VAE_WIDTHS, _TINY_WIDTHS = (320, 640, 1280, 1280), (64,), (64, 64, 64, 64)
_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Footprint:
    """What a call takes beside weights: `fixed` bytes and `row` bytes for every row, the elements of one row's largest
    tensor, and the FLOP of one row.
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
        """Of calls that have one number of rows: enough for either."""
        elements, flop = max(self.elements, other.elements), max(self.flop, other.flop)
        return Footprint(max(self.fixed, other.fixed), max(self.row, other.row), elements, flop)


@dataclass(frozen=True)
class CallPlan:
    """How a network's rows of one group are cut into calls.

    rows   of a call; the last of a group's calls is filled up to them
    calls  that hold a group's rows once
    bytes  at the peak of a call, without weights
    bound  which limit decided: "group" where one call holds it all
    """

    rows: int
    calls: int
    bytes: int
    bound: str


def plan_calls(total: int, footprint: Footprint, limits: Mapping[str, int], unit: int, exact: str = "") -> CallPlan:
    """Cut `total` rows: as few calls as the limits allow, no larger than those need, in multiples of `unit` above it.

    limits: name -> most rows. A limit below 1 counts as 1: with one row the device has the last word. Of equal ones the
        first decides. The limit named `exact` is taken as it is, in no multiples.
    """
    bound, most = min(limits.items(), key=lambda limit: limit[1], default=("group", total))
    if most >= total:
        return CallPlan(total, 1, footprint.bytes(total), "group")
    rows = max(most, 1) if bound == exact else shared(total, max(most, 1), unit)
    return CallPlan(rows, -(-total // rows), footprint.bytes(rows), bound)


def shared(total: int, most: int, unit: int) -> int:
    """Rows of a call, `most` at most, for as few calls as that allows with as little filling as they need.

    Multiples of `unit`, but for all of `total` rows or where `most` is below it.
    """
    if most >= total:
        return total
    step = unit if most >= unit else 1
    calls = -(-total // (most - most % step))
    return -(-total // (calls * step)) * step


def halved(rows: int, unit: int) -> int:
    """The next number of rows to try where a call of `rows` > 1 ran out of memory: half, in multiples of `unit`."""
    half = rows // 2
    return half - half % unit if half > unit else half


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
    areas = _halved(latent_size, len(widths))
    found = [max(int(config.get("in_channels", 4)), int(config.get("out_channels", 4)), widths[0]) * areas[0]]
    for i, (width, area, kind) in enumerate(zip(widths, areas, down, strict=True)):
        found += [max(width, widths[max(i - 1, 0)]) * area, _in_block(width, area, kind)]
    if config.get("downsample_padding", 1) == 0 and len(widths) > 1:  # its maps are padded by hand instead
        sizes = _sizes(latent_size, len(widths))
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
    """The same of the decoder of an AutoencoderKL or AutoencoderTiny.

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


def _halved(latent_size: tuple[int, int], levels: int) -> list[int]:
    return [h * w for h, w in _sizes(latent_size, levels)]
