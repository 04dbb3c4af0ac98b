"""A trial of a prior's networks on a few numbers: what its configs leave wrong shows before any work, and is named."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError, first_line
from dfkd_engine.priors.configs import failure, make_diffusers, make_transformers
from dfkd_engine.priors.families.family import Family
from dfkd_engine.priors.families.text import TextEncoder
from dfkd_engine.priors.folder import FETCH, PriorFolder

_SIDE = 8  # of latents that are enough for a trial; larger ones than the trained are not taken


@torch.no_grad()
def try_networks(folder: PriorFolder, family: Family, denoiser: Any, vae: Any) -> None:
    """One empty prompt through the text encoders, one small latent through denoiser and decoder.

    Raises EngineError, which names the part, and the key of its config where leaving it out helps.
    """
    for part, reader in zip(family.encoders, family.readers, strict=True):
        _try_text(folder, part, reader)
    side = _side(family)
    z = torch.zeros(1, denoiser.config.in_channels, side, side, device=denoiser.device)
    given = family.unconditional("", side if vae is None else 8 * side)
    if len(given) < len(family.inputs):  # class ids, without one that stands for none
        given = (torch.zeros(1, dtype=torch.int64, device=z.device),)

    def denoise(network: Any, z: Tensor, given: tuple[Tensor, ...]) -> None:
        family.predict(network, z.to(denoiser.dtype), 1, *given)

    _try(folder, family.part, denoiser, denoise, z, given)
    if vae is not None:
        _try(folder, "vae", vae, lambda network, z, _: network.decode(z.to(vae.dtype)), z, ())


def _try_text(folder: PriorFolder, part: str, reader: TextEncoder) -> None:
    """An empty prompt through a tokenizer and its network. Raises EngineError."""
    try:
        tokens = reader.padded("").input_ids.to("meta")
    except EngineError:
        raise
    except Exception as error:  # of the tokenizers' library, whatever it is
        what = f"prior {folder.path}: {part.replace('text_encoder', 'tokenizer')}"
        raise EngineError(what, f"it fails on an empty prompt ({first_line(error)})", FETCH) from error
    try:
        reader("")
    except Exception as error:  # whatever a network's own code meets

        def again(config: dict[str, Any]) -> None:
            make_transformers(type(reader.network), config)(tokens, output_hidden_states=True)

        raise failure(f"prior {folder.path}: {part}/config.json", folder.configs[part], error, again) from error


def _try(
    folder: PriorFolder,
    part: str,
    network: Any,
    call: Callable[[Any, Tensor, tuple[Tensor, ...]], object],
    z: Tensor,
    given: tuple[Tensor, ...],
) -> None:
    """`call` of a network of diffusers. Raises EngineError as `failure`."""
    try:
        call(network, z, given)
    except Exception as error:  # whatever a network's own code meets

        def again(config: dict[str, Any]) -> None:
            call(make_diffusers(type(network), config), z.to("meta"), tuple(tensor.to("meta") for tensor in given))

        where = f"prior {folder.path}: {part}/config.json"
        raise failure(where, folder.configs[part], error, again) from error


def _side(family: Family) -> int:
    """A side that the denoiser takes, as small as is enough."""
    step = family.multiple
    side = -(-_SIDE // step) * step
    return side if family.largest is None else max(min(side, family.largest // step * step), step)
