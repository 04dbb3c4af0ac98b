"""Which attention a UNet or a VAE runs with where it runs eagerly: torch's SDPA or xformers.

A traced graph has neither: its attention is plain matrix products, and the compiler's own affair.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from dfkd_engine.backends.packages import missing, versions
from dfkd_engine.errors import EngineError

NAMES = ("auto", "sdpa", "xformers")


@dataclass(frozen=True)
class Attention:
    """name: "sdpa" or "xformers". reason: why, in a phrase."""

    name: str
    reason: str


def choose_attention(wanted: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Attention:
    """What `wanted` of NAMES comes to: "auto" is xformers where that has an operator, forward and backward.

    Raises EngineError for another name, or xformers where it cannot run.
    """
    if wanted not in NAMES:
        raise EngineError(f"the attention {wanted!r} is unknown", f"known are {', '.join(NAMES)}", "choose one of them")
    if wanted == "sdpa":
        return Attention("sdpa", "as asked")
    why = xformers_unusable(device, dtype)
    if wanted == "xformers":
        if why is not None:
            raise EngineError("the attention xformers cannot be used", why, "choose sdpa or auto")
        return Attention("xformers", "as asked")
    if why is not None:
        return Attention("sdpa", why)
    return Attention("xformers", f"xformers {versions('xformers')['xformers']} has an operator for it")


def xformers_unusable(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why xformers cannot compute attention of `dtype` and its gradient on `device`; None: it can."""
    if missing("xformers"):
        return "xformers is not installed (pip install 'dfkd[gpu]')"
    try:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"xformers does not import ({error})"
    q = torch.zeros(1, 2, 40, device=device, dtype=dtype)
    with torch.enable_grad():
        q.requires_grad_()
        try:
            torch.autograd.grad(attention(q, q, q).sum(), q)
        except NotImplementedError:
            return f"xformers has no operator for {str(dtype).removeprefix('torch.')} on {torch.device(device).type}"
    return None


def set_attention(network: Any, name: str) -> int:
    """Let every attention layer of a diffusers network use "sdpa" or "xformers"; returns how many there are.

    A network without any, such as an AutoencoderTiny, is left as it is, and so are layers of a kind of their own, whose
    inputs these processors would ignore: they call torch's attention. Raises EngineError for "xformers" there.
    """
    from diffusers.models import attention_processor

    kinds = {"sdpa": attention_processor.AttnProcessor2_0, "xformers": attention_processor.XFormersAttnProcessor}
    plain = (*kinds.values(), attention_processor.AttnProcessor)
    before = getattr(network, "attn_processors", {})
    for place, processor in before.items():
        if not isinstance(processor, plain):
            if name == "sdpa":
                return 0
            why = f"{place} is a {type(processor).__name__}, which is of its own kind"
            raise EngineError(f"the attention {name} cannot be set", why, "use the network as it is")
    if before:
        network.set_attn_processor(kinds[name]())
    return len(before)
