"""Any image that Pillow reads as 8-bit RGB, so that every loader and every network sees the same pixels.

By the modes and forms that files have:

    16 bit (I;16, any byte order)   0..65535 -> 0..255; Pillow's own convert() clips at 255, which is white
    I, F                            no range of their own: the values tell whether integers go to 255 or 65535, floats
                                    to 1 or 255; beyond that, negative or not finite they are refused
    alpha, transparent palettes     the colours as they are stored, nothing composited, as torchvision and timm
    EXIF orientation, profiles      not applied, as by torchvision's ImageFolder
    animations, several pages       the first
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, of the same size. Raises ValueError for values without a known range."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_levels(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied: first as they were
        image = image.convert(image.mode.upper())
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns of what convert("RGB") leaves out
        image = image.convert("RGBA")
    return image.convert("RGB")


def square(image: Image.Image, size: int | None = None) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3], read-only; with a size, of the square in the middle, resized to size x size (bicubic,
    antialiased) unless it has that size. Raises ValueError as rgb() does."""
    image = rgb(image)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _levels(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    numbers = values.astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    ranges = {"I": (255, 65535), "F": (1, 255)}.get(mode, (65535,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:  # NaN fails both comparisons
        known = " or ".join(map(str, ranges))
        raise ValueError(f"values from {low:g} to {high:g} in mode {mode}, known are 0 to {known}")
    return np.rint(numbers * (255 / top)).astype(np.uint8)
