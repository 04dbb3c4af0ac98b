"""One image as the bytes of a file, and back."""

import io
import math
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from dfkd.rgb import square

ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}  # the last bytes of whole files


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

    image_format: "npy" for arrays that `encode` wrote; anything else is told by the bytes. size: as of dfkd.rgb.square,
    which says what becomes of other modes. Raises OSError or ValueError for bytes that are no such image.
    """
    if image_format == "npy":
        head = data[:128]
        shape = _npy_shape(head)
        if len(data) != len(head) + math.prod(shape):
            raise ValueError(f"{len(data)} bytes are not an array {shape}")
        return np.frombuffer(data, np.uint8, offset=len(head)).reshape(shape)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return square(opened, size)
    except Exception as error:
        raise _damage(error) from None


def is_plain(image: ImageFile.ImageFile) -> bool:
    """Whether every decoder makes the same pixels of this file: a JPEG or a PNG of 8-bit grey or RGB without more.

    image: opened, not loaded; Pillow's `tile` tells the file's own form, which `mode` hides for 16-bit colour.
    """
    if image.mode not in ("L", "RGB"):
        return False
    if image.format in ("JPEG", "MPO"):
        return True
    form = [tile[3] for tile in image.tile]
    return image.format == "PNG" and form == [image.mode] and not ({"transparency", "loop"} & image.info.keys())


def probe(source: Path | bytes) -> bool:
    """is_plain of an image file that is whole, of which only the first and the last bytes are read.

    One that does not end as its format does is decoded to be sure: some writers put something behind the image.
    Raises OSError for a file that cannot be opened or is cut off; ValueError for bytes that are no image, and for more
    pixels than Pillow decodes (a decompression bomb).
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file, Image.open(file) as opened:
            plain = is_plain(opened)
            if not _ends_well(file, opened.format or ""):
                opened.load()
            return plain
    except Exception as error:
        raise _damage(error) from None


def _ends_well(file: IO[bytes], image_format: str) -> bool:
    """Whether the file ends where its format says; False where that says nothing."""
    if image_format == "WEBP":  # "RIFF", and how many bytes follow
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 == file.seek(0, io.SEEK_END)
    end = ENDS.get(image_format)
    if end is None:
        return False
    file.seek(-len(end), io.SEEK_END)
    return file.read() == end


def _damage(error: Exception) -> OSError | ValueError:
    """What Pillow raises for damaged files, which depends on the format and on the damage, as one of two kinds."""
    if isinstance(error, UnidentifiedImageError):  # it names the buffer
        return ValueError("the bytes are no image that Pillow knows")
    if isinstance(error, OSError):
        return error
    return ValueError(str(error) or type(error).__name__)


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
