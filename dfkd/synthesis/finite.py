"""What was first not finite, image by image: noted on the device as networks are called, and read once, at the end."""

from collections.abc import Collection

import torch
from torch import Tensor

from dfkd.errors import UsageError

FAR = 1000.0  # latents beyond it are lost, though finite: those of a diffusion model have a deviation of 1
_BF16 = "float16 ends at 65 504: use --dtype bf16"
_SHORTER = "lower --guidance-step"
_PRIOR = "see to the prior: its weights, and what its scheduler's config says of its predictions"


class NotFinite(UsageError, FloatingPointError):
    """Images that hold NaN or infinite numbers: which, what was so first, and what helps."""


class Faults:
    """What was seen of a pack of images, and for each image [B] the first of it that was not finite.

    Kinds: "unet" (a prediction), a loss by its name, "gradient", "latents" (those beyond FAR too), "decode".
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self._seen: list[tuple[str, str]] = []
        self._first = torch.zeros(images, dtype=torch.int64, device=device)  # 1 + the place in `_seen`; 0: none

    @torch.no_grad()
    def see(self, tensor: Tensor, kind: str, where: str, images: Tensor | None = None) -> None:
        """Note a result [B, ...] of the images at these positions of the pack (int64 [B]; None: all).

        where: the step, for people. Nothing waits for the device.
        """
        self._seen.append((kind, where))
        sound = tensor.isfinite() if kind != "latents" else tensor.abs() <= FAR
        broken = ~sound.flatten(1).all(1) if sound.dim() > 1 else ~sound
        known = self._first if images is None else self._first[images]
        found = torch.where(broken & (known == 0), len(self._seen), known)
        self._first = found if images is None else self._first.index_put((images,), found)

    def error(self, ids: Tensor, finite: Tensor, half: Collection[str]) -> NotFinite:
        """The error for a pack whose images are not all `finite` (bool [B]).

        half: which of "unet" and "decode" compute in float16.
        """
        broken = (~finite).cpu()
        place = int(self._first.cpu()[broken].min()) - 1
        kind, where = self._seen[place] if place >= 0 else ("decode", "")
        guided = any(kind == "gradient" for kind, _ in self._seen[:place])
        what = f"the images {ids.cpu()[broken].tolist()} are not finite"
        return NotFinite(what, f"first is {_words(kind)}{where and f' at {where}'}", _advice(kind, guided, half))


def require_finite(images: Tensor, ids: Tensor, todo: str) -> None:
    """Raise NotFinite for images [B, 3, H, W] of a method without networks of its own; it waits for the device."""
    finite = images.isfinite().flatten(1).all(1).cpu()
    if not finite.all():
        why = "the steps along the losses' gradient left the numbers' range"
        raise NotFinite(f"the images {ids.cpu()[~finite].tolist()} are not finite", why, todo)


def _words(kind: str) -> str:
    known = {
        "unet": "the denoiser's prediction",
        "gradient": "the guidance gradient",
        "latents": f"the latents, beyond {FAR:g},",
        "decode": "the decoder's image",
    }
    return known.get(kind, f"the guidance loss {kind}")


def _advice(kind: str, guided: bool, half: Collection[str]) -> str:
    """What helps. guided: whether a guidance step was taken before."""
    if kind in ("unet", "decode"):
        return _BF16 if kind in half else _SHORTER if guided else _PRIOR
    if kind == "latents":
        return _SHORTER if guided else _PRIOR
    if half:  # the losses are of what the decoder draws, and the gradient passes it back, in float16 both
        return _BF16
    return "see to the losses, one after another: --bn-weight 0, --cls-weight 0, or one of your own"
