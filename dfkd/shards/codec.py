"""One image as the bytes of a file and back."""

import io

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
        array: npt.NDArray[np.uint8] = np.load(io.BytesIO(data), allow_pickle=False)
        return array
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
