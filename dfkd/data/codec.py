"""One image as the bytes of a file, and back."""

import io
import math
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError


def encode(image: NDArray[np.uint8], image_format: str) -> bytes:
    """One image, uint8 [H, W, 3], as a png, jpg (quality 95, full colour resolution) or npy file."""
    out = io.BytesIO()
    if image_format == "npy":
        np.save(out, image)
    elif image_format == "jpg":
        Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def decode(data: bytes, image_format: str = "", size: int | None = None) -> NDArray[np.uint8]:
    """RGB pixels, uint8 [H, W, 3], read-only, of a file's bytes.

    image_format: "npy" for arrays that `encode` wrote; anything else is told by the bytes. size: the square in the
    middle, resized to size x size (bicubic, antialiased) unless it has that size. Raises OSError or ValueError for
    bytes that are no such image.
    """
    if image_format == "npy":
        head = data[:128]
        shape = _npy_shape(head)
        if len(data) != len(head) + math.prod(shape):
            raise ValueError(f"{len(data)} bytes are not an array {shape}")
        return np.frombuffer(data, np.uint8, offset=len(head)).reshape(shape)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except UnidentifiedImageError:  # it names the buffer
        raise ValueError("the bytes are no image that Pillow knows") from None
    except (SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:  # beside OSError, of damage
        raise ValueError(str(error)) from None
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


@lru_cache(maxsize=16)  # all images of a folder have the same header
def _npy_shape(head: bytes) -> tuple[int, ...]:
    """The shape in an npy file's header, which fills the first 128 bytes of a file that `encode` wrote."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an npy file of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype != np.uint8 or file.tell() != len(head):
        raise ValueError(f"an array of {dtype}, which is no image that dfkd wrote")
    return shape
