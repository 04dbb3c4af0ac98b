"""Images decoded and viewed by NVIDIA DALI, ahead of the step that takes them.

One pipeline does all of it, on the CPU (device_id None) or, from JPEG's entropy decoding on, on the GPU: decode, view,
normalise, cast, channels last. It reads nothing and draws nothing by itself: every step's encoded bytes come from
``data`` by our order, and its view as numbers, so that the batches are those of the other sources.

    window   a slice past the border, zeros there, then mirrored: equal to the other sources' but for the rounding of
             the normalisation (about 1e-6 of a deviation)
    matrix   warp_affine. DALI repeats the border where we reflect it, so the reflected border is laid around the image
             first. Equal but for the rounding of positions (below 0.01 of a level at 32x32)
    colour   arithmetic on what was warped
    hole     erased behind the normalisation, with what mid-grey is there
    decoding has the bits of Pillow for PNG and, on the CPU, JPEG of 8-bit grey or RGB (libjpeg-turbo, accurate DCT,
             fancy upsampling); nvJPEG on a GPU differs by a few levels. What is anything else reaches DALI as a PNG
             of what Pillow reads (ImageFiles.encoded)
    resizing pixels that are not in the networks' size are only decoded here; torch resizes them, as in the other
             sources, and applies the view: one arithmetic for guidance and all sources
    fitting  image files of any size, cut and resized as dfkd.data.codec does with Pillow, in float where Pillow rounds
             between its two passes: a level apart at most, where an image has another size
    bfloat16 is torch's cast of the pipeline's float32; float16 is DALI's own
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfkd.data.batches import Batch, Encoded, Form, Images, Step, read_pixels, resize
from dfkd.data.views import REACH, Views, draw, padding
from dfkd.errors import UsageError

AHEAD = 2  # batches in the making while one is used
# Inputs of the pipeline by name: type, dimensions of a sample, layout.
INPUTS = {
    "bytes": ("UINT8", 1, ""),
    "pixels": ("UINT8", 3, "HWC"),
    "corner": ("INT32", 1, ""),
    "mirror": ("INT32", 0, ""),
    "matrix": ("FLOAT", 2, ""),
    "colour": ("FLOAT", 1, ""),
    "place": ("FLOAT", 1, ""),
    "extent": ("FLOAT", 1, ""),
}


@cache
def installed() -> bool:
    """Whether DALI, which is optional, can be imported; it takes half a second, once it is asked for."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):  # the second where a library of it cannot be loaded
        return False
    return True


def _nvidia() -> Any:
    import nvidia.dali
    import nvidia.dali.math

    return nvidia.dali


class Dali:
    """Batches made by DALI. threads: that decode and view; rows: of the largest batch; kind: of the views."""

    def __init__(self, data: Images, positions: Tensor, form: Form, kind: str, rows: int, threads: int) -> None:
        self.form = form
        self.labels, self.ids = data.labels[positions], data.ids[positions]
        # The pipeline holds the feed, and the feed nothing of this: a cycle would leave its threads to be collected
        # anywhere, in a forked worker too.
        self._feed = _Feed(data, positions, form, kind)
        self._making = rows, max(1, threads)
        self._pipe = _pipeline(self._feed, form, *self._making)

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        form, feed = self.form, self._feed
        finalizing = sys.is_finalizing  # the module may be gone by then
        feed.steps = iter(steps)
        self._pipe.reset()
        try:
            self._schedule()
            while feed.asked:
                pixels = self._next()
                step = feed.asked.popleft()
                self._schedule()
                if feed.views_here:
                    images = pixels.permute(0, 3, 1, 2).to(form.dtype)
                else:
                    resized = resize(pixels.permute(0, 3, 1, 2), form.size, form.resize).permute(0, 2, 3, 1)
                    images = form.finish(resized, step.views)
                labels = self.labels[step.positions].to(form.device, non_blocking=True)
                yield Batch(images, labels, self.ids[step.positions], step.random)
        finally:
            if not finalizing():  # then DALI has taken its pipelines down already
                self._drain()

    def _drain(self) -> None:
        """Empty the pipeline of the batches made ahead, and begin again: DALI starts an epoch only after the last."""
        self._feed.steps = iter(())
        while self._feed.asked and not self._pipe.empty():  # empty where the inputs of a step were refused
            self._next()
            self._feed.asked.popleft()
        self._feed.asked.clear()
        self._schedule()

    def _schedule(self) -> None:
        """Let the pipeline begin with the next step.

        The first call takes as many steps as are made ahead; a call that finds no step left does nothing.
        """
        self._pipe.schedule_run()

    def _next(self) -> Tensor:
        """The pixels of the first step that was asked for."""
        form, step = self.form, self._feed.asked[0]
        if not len(step.positions):  # DALI knows no empty batch, and none was fed
            return torch.empty(0, form.size, form.size, 3, dtype=torch.uint8, device=form.device)
        stream = torch.cuda.current_stream(form.device) if form.device.type == "cuda" else None
        try:
            (out,) = self._pipe.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            self._feed.asked.clear()
            self._pipe = _pipeline(self._feed, form, *self._making)  # the former is of no more use
            raise self._feed.damaged(step, error) from None
        found: Tensor = torch.utils.dlpack.from_dlpack(out.as_tensor())
        self._pipe.release_outputs()  # the tensor keeps its memory
        return found


class _Feed:
    """The pipeline's inputs, step by step: images as bytes or pixels, then the numbers of their views."""

    def __init__(self, data: Images, positions: Tensor, form: Form, kind: str) -> None:
        self.data, self.positions, self.size, self.how = data, positions, form.size, form.resize
        size = form.size
        self.encoded = isinstance(data, Encoded) and data.files != ""
        self.fit = data.image_size if isinstance(data, Encoded) and data.files == "fitted" else 0
        # Whether the pipeline makes the view as well: of images that are not in the networks' size torch does.
        self.views_here = not isinstance(data, Encoded) or data.image_size == size
        self.inputs = _inputs_of(kind) if self.views_here else ()
        # At 4 pixels and more it is narrower than the image that it mirrors. Parts of an image need none.
        self.border = min(size, ceil(REACH * size) + 1) if "matrix" in self.inputs and kind != "rrc-flip" else 0
        self.steps: Iterator[Step] = iter(())
        self.asked: deque[Step] = deque()

    def __call__(self) -> tuple[Any, ...]:
        """Inputs of the next step; raises StopIteration where there is none."""
        step = next(self.steps)
        while not len(step.positions):
            self.asked.append(step)
            step = next(self.steps)
        positions = self.positions[step.positions]
        if self.encoded:
            images: Any = self.data.encoded(positions)  # type: ignore[attr-defined]
        elif self.views_here:
            images = read_pixels(self.data, positions, self.size, self.how).numpy()
            if self.border:
                images = _between_mirrors(_between_mirrors(images, self.border, 2), self.border, 1)
        else:
            images = self.data.read(positions).permute(0, 2, 3, 1).contiguous().numpy()
        self.asked.append(step)
        return (images, *(_arguments(step.views, self.size, self.border) if self.views_here else ()))

    def damaged(self, step: Step, error: RuntimeError) -> UsageError:
        """The error to raise for a batch that DALI could not decode.

        By file and id it names the image that Pillow cannot read either; where Pillow reads all, what DALI says.
        """
        positions = self.positions[step.positions]
        for position in positions:
            try:
                self.data.read(position[None])
            except UsageError as named:
                return named
        ids = ", ".join(map(str, self.data.ids[positions].tolist()))
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = next((line for line in lines if "rror" in line and "Critical" not in line), lines[0])
        return UsageError(f"DALI cannot make the batch of the images {ids}", why, "use --loader torch")


def _pipeline(feed: _Feed, form: Form, rows: int, threads: int) -> Any:
    nvidia = _nvidia()
    fn = nvidia.fn
    gpu = form.device.type == "cuda"
    names = ["bytes" if feed.encoded else "pixels", *feed.inputs]
    kinds, dimensions, layouts = zip(*(INPUTS[name] for name in names), strict=True)
    dtypes = [getattr(nvidia.types, kind) for kind in kinds]
    device = (form.device.index or 0) if gpu else None
    pipe = nvidia.Pipeline(batch_size=rows, num_threads=threads, device_id=device, prefetch_queue_depth=AHEAD)
    with pipe:
        images, *arguments = fn.external_source(
            source=feed, num_outputs=len(names), dtype=dtypes, ndim=list(dimensions), layout=list(layouts)
        )
        encoded = images
        images = _decoded(images, feed.encoded, gpu)
        if feed.fit:
            images = _fitted(images, encoded, feed.fit)
        if feed.views_here:
            images = _viewed(images, dict(zip(feed.inputs, arguments, strict=True)), form, feed)
        pipe.set_outputs(images)
    pipe.build()
    return pipe


def _inputs_of(kind: str) -> tuple[str, ...]:
    """Names of the pipeline's inputs beside the images for views of this kind, in the order of _arguments."""
    views = draw(kind, 1, 8, 8, torch.Generator())
    window = ("corner", "mirror") if views.window is not None else ()
    hole = ("place", "extent") if views.hole is not None else ()
    return (*window, *(name for name in ("matrix", "colour") if getattr(views, name) is not None), *hole)


def _arguments(views: Views, size: int, border: int) -> Iterator[NDArray[Any]]:
    """The views as DALI takes them: positions in pixels of the image, or of the one with a border around it."""
    if views.window is not None:
        yield (views.window[:, :2] - torch.tensor(padding(size, size))).int().numpy()
        yield views.window[:, 2].int().numpy()
    if views.matrix is not None:
        yield _in_pixels(views.matrix, size, border).numpy()
    if views.colour is not None:
        yield views.colour.numpy()
    if views.hole is not None:
        yield views.hole[:, :2].float().numpy()
        yield views.hole[:, 2:].float().numpy()


def _in_pixels(matrix: Tensor, size: int, border: int) -> Tensor:
    """matrix [B, 2, 3] of positions in -1..1 -> the same map of positions in pixels, 0 the outer edge of the first.

    The positions looked up are in the image with a border around it.
    """
    turn, move = matrix.double().split((2, 1), dim=2)  # type: ignore[no-untyped-call]
    # u = 2 x / size - 1 on both sides: x' = turn x + size / 2 (move + 1 - turn (1, 1))
    shift = size / 2 * (move + 1 - turn.sum(2, keepdim=True))
    return torch.cat((turn, shift + border), dim=2).float()


def _decoded(images: Any, encoded: bool, gpu: bool) -> Any:
    fn, types = _nvidia().fn, _nvidia().types
    if encoded:
        # Pillow's defaults: no rotation by EXIF, smooth chroma, the accurate DCT.
        return fn.decoders.image(
            images,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
    return images.gpu() if gpu else images


def _fitted(images: Any, encoded: Any, size: int) -> Any:
    """The largest square in the middle, size x size: PIL.ImageOps.fit, bicubic (a = -0.5), antialiased."""
    fn, types = _nvidia().fn, _nvidia().types
    shape = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[0:2], dtype=types.FLOAT)
    side = fn.reductions.min(shape)
    start = (shape - side) / 2
    return fn.resize(
        images,
        size=[size, size],
        roi_start=start,
        roi_end=start + side,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


def _viewed(images: Any, views: dict[str, Any], form: Form, feed: _Feed) -> Any:
    """uint8 HWC -> the view, normalised, HWC."""
    fn, types = _nvidia().fn, _nvidia().types
    size = form.size
    mirror = views.get("mirror", 0)
    if "corner" in views:
        images = fn.slice(
            images, start=views["corner"], shape=[size, size], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
    if "matrix" in views:
        if feed.encoded and feed.border:
            images = _reflected(_reflected(images, size, feed.border, 1), size, feed.border, 0)
        images = fn.warp_affine(
            images, matrix=views["matrix"], size=[size, size], dtype=types.FLOAT, interp_type=types.INTERP_LINEAR
        )
    if "colour" in views:
        images = _coloured(images, views["colour"].gpu() if form.device.type == "cuda" else views["colour"])
    dtype = types.FLOAT16 if form.dtype == torch.float16 else types.FLOAT
    images = fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        mean=[255 * value for value in form.mean],
        std=[255 * value for value in form.std],
        dtype=types.FLOAT if "place" in views else dtype,
        output_layout="HWC",
    )
    if "place" not in views:
        return images
    grey = [(0.5 - mean) / std for mean, std in zip(form.mean, form.std, strict=True)]
    hole = {"anchor": views["place"], "shape": views["extent"], "axis_names": "HW"}
    return fn.cast(fn.erase(images, fill_value=grey, **hole), dtype=dtype)


def _between_mirrors(pixels: NDArray[np.uint8], border: int, axis: int) -> NDArray[np.uint8]:
    """Pixels [B, H, W, 3] between `border` mirrored lines on either side along an axis, in main memory.

    The equal of _reflected for pixels that DALI is fed: it copies the batch once, not each image.
    """
    first, last = np.split(pixels, [border], axis)[0], np.split(pixels, [-border], axis)[1]
    return np.concatenate((np.flip(first, axis), pixels, np.flip(last, axis)), axis)


def _reflected(images: Any, size: int, border: int, axis: int) -> Any:
    """The image between mirror images of its sides along an axis."""
    fn = _nvidia().fn
    mirrored = fn.flip(images, horizontal=int(axis == 1), vertical=int(axis == 0))
    before = fn.slice(mirrored, start=[size - border], shape=[border], axes=[axis])
    after = fn.slice(mirrored, start=[0], shape=[border], axes=[axis])
    return fn.cat(before, images, after, axis=axis)


def _coloured(images: Any, colour: Any) -> Any:
    """dfkd.data.views.colour on levels 0 to 255."""
    fn, math = _nvidia().fn, _nvidia().math
    contrast, brightness, gain = colour[0], colour[1], colour[2:5]
    offset = fn.reductions.mean(images) * (1 - contrast) + 255 * brightness
    return fn.reinterpret(math.clamp(images * (contrast * gain) + offset * gain, 0, 255), layout="HWC")
