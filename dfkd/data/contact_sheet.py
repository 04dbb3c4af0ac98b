"""Contact sheets: the first images of every class, unpicked, as strips and as one picture with the classes' names.

A preview is a small one of the newest images, made in some tens of milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dfkd.data.shards import Pool, ShardPool

SMALL = 64  # pixels: images up to here are shown enlarged by a whole factor, larger ones reduced to LARGE
LARGE = 128
ACROSS = 1024  # pixels that a row of tiles may take
MOST_ROWS = 30  # classes; of more, evenly spread ones are shown
PREVIEW_ROWS, PREVIEW_COLUMNS = 12, 8
INK, PAPER = (28, 36, 48), (255, 255, 255)


@dataclass(frozen=True)
class Strip:
    """One class's row: RGBA picture of `shown` tiles with clear gaps, to be shown `scale` times as large."""

    label: int
    class_name: str
    picture: Image.Image
    shown: int
    scale: int


def preview(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> Image.Image:
    """The last images of every class, of many classes of evenly spread ones, each of SMALL pixels at most.

    images: uint8 [N, 3, H, W]. labels: int64 [N], both on the CPU.
    """
    shown = evenly(torch.unique(labels), PREVIEW_ROWS)
    rows = torch.cat([(labels == label).nonzero()[:, 0].flip(0)[:PREVIEW_COLUMNS] for label in shown])
    every = max(images.shape[-1] // (2 * SMALL), 1)  # of a large image's pixels: averaging them all takes too long
    planes = images[rows, :, ::every, ::every].flatten(0, 1).numpy()
    factor = -(-planes.shape[-1] // SMALL)
    small = torch.from_numpy(np.stack([np.asarray(Image.fromarray(plane).reduce(factor)) for plane in planes]))
    small = torch.unflatten(small, 0, (len(rows), 3))
    pool = Pool(small, labels[rows], rows, tuple(class_names), digest="preview")  # it is never asked for one
    return sheet(strips(pool, PREVIEW_COLUMNS))


def evenly(values: Tensor, most: int) -> Tensor:
    """At most so many of the values [N], spread evenly over them."""
    return values if len(values) <= most else values[torch.arange(most) * len(values) // most]


def strips(pool: ShardPool | Pool, columns: int | None = None, labels: Tensor | None = None) -> list[Strip]:
    """A strip per class that has images, in the order of the classes.

    columns: tiles a row; by default as many as fit into ACROSS pixels, 16 for images of up to SMALL pixels. labels:
    int64 [n], of some of the classes that have images.
    """
    tile, scale = _tile(pool.image_size)
    columns = columns or max(1, ACROSS // (tile * scale))
    rows = []
    for label in evenly(torch.unique(pool.labels) if labels is None else labels, MOST_ROWS).tolist():
        positions = (pool.labels == label).nonzero()[:columns, 0]
        images = pool.read(positions).permute(0, 2, 3, 1).numpy()
        strip = Image.new("RGBA", (columns * (tile + 1) - 1, tile))
        for column, image in enumerate(images):
            strip.paste(_fit(image, tile), (column * (tile + 1), 0))
        rows.append(Strip(label, pool.class_names[label], strip, len(images), scale))
    return rows


def sheet(rows: Sequence[Strip]) -> Image.Image:
    """The strips one under the other, enlarged, each with its class's name at the left: a picture that stands alone."""
    import matplotlib.font_manager  # takes half a second, which most runs can do without

    font = ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), 18)
    margin = 12
    left = 2 * margin + max(round(font.getlength(row.class_name)) for row in rows)
    tiles = stack(rows)
    out = Image.new("RGB", (left + tiles.width + margin, tiles.height + 2 * margin), PAPER)
    out.paste(tiles, (left, margin), tiles)
    draw, step = ImageDraw.Draw(out), (tiles.height + rows[0].scale) / len(rows)
    for number, row in enumerate(rows):
        draw.text((left - margin, margin + (number + 0.48) * step), row.class_name, fill=INK, font=font, anchor="rm")
    return out


def stack(rows: Sequence[Strip]) -> Image.Image:
    """The strips one under the other, enlarged, with clear gaps and without names."""
    width, height = rows[0].picture.size
    out = Image.new("RGBA", (width, len(rows) * (height + 1) - 1))
    for number, row in enumerate(rows):
        out.paste(row.picture, (0, number * (height + 1)))
    return out.resize((out.width * rows[0].scale, out.height * rows[0].scale), Image.Resampling.NEAREST)


def _tile(size: int) -> tuple[int, int]:
    """Side of a tile in its own pixels, and the factor by which it is enlarged."""
    return (LARGE, 1) if size > SMALL else (size, SMALL // size)


def _fit(image: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", tile: int) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.width == tile else picture.resize((tile, tile), Image.Resampling.LANCZOS)
