"""Files in every mode that Pillow knows become the same pixels in every loader, and what has no range is refused."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dfkd.data import Form, ImageFiles, Listing, LoaderChoice, Step, Views, dali, decode, open_source
from dfkd.errors import UsageError
from dfkd.teachers import Classifier

SIDE = 12
GREY = np.linspace(3, 252, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=2)
DEEP = GREY.astype(np.uint16) * 257
BASE, RGB = Image.fromarray(GREY), Image.fromarray(COLOUR)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(GREY // 2))
    return image


def palette() -> Image.Image:
    image = RGB.quantize(64)
    image.info["transparency"] = bytes(range(64))
    return image


def rotated() -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")
    assert image is not None
    return image


def reopened(data: bytes) -> np.ndarray:
    """What Pillow reads of a lossy file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


PLAIN = ("L", "RGB", "rotated", "jpeg", "grey jpeg", "mpo")
# What a file holds, and the pixels that are wanted of it, within 2 levels (JPEG's more are its own).
FILES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "L": (lambda: saved(BASE, "PNG"), GREY),
    "RGB": (lambda: saved(RGB, "PNG"), COLOUR),
    "1": (lambda: saved(BASE.point(lambda x: 255 * (x > 127)).convert("1"), "PNG"), np.where(GREY > 127, 255, 0)),
    "LA": (lambda: saved(with_alpha(BASE), "PNG"), GREY),
    "RGBA": (lambda: saved(with_alpha(RGB), "PNG"), COLOUR),
    "P": (lambda: saved(palette(), "PNG", transparency=bytes(range(64))), np.asarray(RGB.quantize(64).convert("RGB"))),
    "I;16": (lambda: saved(Image.fromarray(DEEP), "PNG"), GREY),
    "I;16 tiff": (lambda: saved(Image.fromarray(DEEP), "TIFF"), GREY),
    "I;16B": (lambda: saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), GREY),
    "I;16 jp2": (lambda: saved(Image.fromarray(DEEP), "JPEG2000"), GREY),
    "I of 16 bit": (lambda: saved(Image.fromarray(DEEP), "PPM"), GREY),
    "I of 8 bit": (lambda: saved(BASE.convert("I"), "TIFF"), GREY),
    "F of 0..255": (lambda: saved(BASE.convert("F"), "TIFF"), GREY),
    "F of 0..1": (lambda: saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY),
    "CMYK": (lambda: saved(RGB.convert("CMYK"), "TIFF"), COLOUR),
    "YCbCr": (lambda: saved(RGB.convert("YCbCr"), "TIFF"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
    "LAB": (lambda: saved(lab(), "TIFF"), np.asarray(lab().convert("RGB"))),
    "rotated": (lambda: saved(RGB, "PNG", **rotated()), COLOUR),
    "moving": (lambda: saved(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(90)]), COLOUR),
    "moving png": (lambda: saved(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]), COLOUR),
    "gif": (lambda: saved(BASE, "GIF"), GREY),
    "bmp": (lambda: saved(RGB, "BMP"), COLOUR),
    "jpeg": (lambda: saved(RGB, "JPEG", progressive=True), reopened(saved(RGB, "JPEG", progressive=True))),
    "grey jpeg": (lambda: saved(BASE, "JPEG"), reopened(saved(BASE, "JPEG"))),
    "cmyk jpeg": (lambda: saved(RGB.convert("CMYK"), "JPEG"), reopened(saved(RGB.convert("CMYK"), "JPEG"))),
    "mpo": (lambda: saved(RGB, "MPO", save_all=True, append_images=[BASE]), reopened(saved(RGB, "JPEG"))),
    "avif": (lambda: saved(BASE, "AVIF", quality=100), GREY),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_mode_is_read_by_its_range(name: str) -> None:
    make, wanted = FILES[name]
    wanted = np.broadcast_to(wanted if wanted.ndim == 3 else wanted[:, :, None], (SIDE, SIDE, 3)).astype(int)
    assert np.abs(decode(make()).astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("name", FILES)
def test_what_other_decoders_are_given_is_8_bit_grey_or_rgb_of_the_same_pixels(name: str) -> None:
    """So that DALI, wherever it is, agrees: anything but plain JPEG and PNG reaches it as a PNG that was made here."""
    data = FILES[name][0]()
    listing = Listing([data], [0], ("a",))
    (given,) = ImageFiles(listing, SIDE).encoded(torch.tensor([0]))
    assert listing.plain.tolist() == [name in PLAIN]
    assert (given.tobytes() == data) == bool(listing.plain[0])
    with Image.open(io.BytesIO(given.tobytes())) as image:
        assert image.format in ("PNG", "JPEG", "MPO") and image.mode in ("L", "RGB")
    assert np.array_equal(decode(given.tobytes()), decode(data))


@pytest.mark.dali
@pytest.mark.skipif(not dali.installed(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("size", [SIDE, 8])
def test_loaders_agree_on_odd_files(size: int) -> None:
    files = ImageFiles(Listing([make() for make, _ in FILES.values()], [0] * len(FILES), ("a",)), size)
    rows = torch.arange(len(FILES))
    form = Form(size, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"))
    found = []
    for name in ("resident", "torch", "dali"):
        source = open_source(LoaderChoice(name, ""), files, rows, form, "none", len(rows), 0)
        found += [batch.images * 255 for batch in source.batches([Step(rows, Views())])]
    assert (found[0] - found[1]).abs().max() == 0
    assert (found[0] - found[2]).abs().max() <= 2


def test_a_classifier_is_fed_pil_images_by_the_same_range() -> None:
    net = Classifier(torch.nn.Flatten(), tuple(map(str, range(3 * SIDE**2))), (0.0,) * 3, (1.0,) * 3, SIDE)
    assert (net(Image.fromarray(DEEP)) - net(BASE)).abs().max() == 0


@pytest.mark.parametrize(
    "values", [np.full((2, 2), -1, np.int32), np.full((2, 2), 70000, np.int32), np.full((2, 2), np.nan, np.float32)]
)
def test_values_without_a_known_range_are_refused_by_file(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    files = ImageFiles(Listing([tmp_path / "a.tif"], [0], ("a",)), 2)
    with pytest.raises(UsageError, match=r"cannot read \S*a\.tif: values from .* known are 0 to"):
        files.read(torch.tensor([0]))


def test_what_is_no_image_is_named_before_any_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("good.png", "absent.png", "empty.png", "page.png", "large.png")
    RGB.save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>")
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    listing = Listing([tmp_path / name for name in names], [0] * 5, ("a",))
    with pytest.raises(UsageError, match=r"4 of 5 .*absent\.png: No such file.*page\.png: .*; and 1 more"):
        listing.check()
    with pytest.raises(UsageError, match=r"1 of 1 .*large\.png: .*decompression bomb"):
        listing.take(np.array([4])).check()
    assert listing.take(np.array([0])).check().plain.tolist() == [True]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_that_was_cut_off_is_named_and_one_with_more_behind_it_is_not(kind: str) -> None:
    data = saved(RGB, kind)
    assert len(Listing([data, data + b"\0" * 9], [0, 0], ("a",)).check().plain) == 2
    with pytest.raises(UsageError, match=r"1 of 2 images cannot be read: image 1 of the data"):
        Listing([data, data[: len(data) * 3 // 4]], [0, 0], ("a",)).check()
