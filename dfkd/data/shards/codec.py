"""One image as the bytes of a file and back."""

import io
import math
import struct
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image


def encode(image: npt.NDArray[np.uint8], image_format: str) -> bytes:
    """One image, uint8 [H, W, 3], as the bytes of a png, jpg (quality 95, full colour resolution) or npy file."""
    out = io.BytesIO()
    if image_format == "npy":
        np.save(out, image)
    elif image_format == "jpg":
        Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def decode(data: bytes, image_format: str) -> npt.NDArray[np.uint8]:
    """The inverse of ``encode`` (up to JPEG's loss); raises OSError or ValueError for bytes that are no such image."""
    if image_format == "npy":
        head = data[:128]
        shape = _npy_shape(head)
        if len(data) != len(head) + math.prod(shape):
            raise ValueError(f"{len(data)} bytes are not an array {shape}")
        return np.frombuffer(data, np.uint8, offset=len(head)).reshape(shape)
    try:
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    except (SyntaxError, EOFError, struct.error) as error:  # what else Pillow raises for damaged files
        raise ValueError(str(error)) from None


@lru_cache(maxsize=16)  # a folder's images share one
def _npy_shape(head: bytes) -> tuple[int, ...]:
    """The shape in an npy file's header, which fills the first 128 bytes of one of ours."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an npy file of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype != np.uint8 or file.tell() != len(head):
        raise ValueError(f"an array of {dtype}, which is not an image of ours")
    return shape
