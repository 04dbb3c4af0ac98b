"""How large the factors of a network's layers get on inputs such as a run has: what 8 bits have to span.

NVIDIA ModelOpt watches a copy of the network: the largest magnitude of every layer's input, and of each output channel
of its weights. For a UNet such inputs are those of trajectories from noise to image, by the run's prompts and sampler.

What stays wide, with the error of the demo's prediction against float64, mean over the unguided trajectories of ten
images; measured once, with WIDE as the rows say:

                                                       int8      fp8
    every convolution and linear layer in 8 bits      0.029    0.050
    conv_in and conv_out wide                         0.021    0.034    few channels: no time to gain, and their
                                                                        rounding is the prediction's own
    the skips' 1x1 conv_shortcut wide too (as here)   0.018    0.030    two blocks' ranges under one scale; a few % of
                                                                        the products
    feed-forward layers wide instead                  0.017    0.031    a third of the products

Of a transformer its first and last layers stay wide for the same reason, and embeddings, which are no products.
Time embeddings (wide) are computed for one row a call, so eight bits would gain nothing. Attention scores (wide) are
products of two results, which no weights' scale covers, and go through an exponential. ModelOpt's own presets keep
"*proj_out.*" wide, a language model's last layer; here that is a layer of every attention block, so the list is ours.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dfkd_engine.backends.packages import missing
from dfkd_engine.errors import EngineError
from dfkd_engine.quantise import Amax

WIDE = (  # quantisers of ModelOpt, as it matches names
    *("conv_in.*", "conv_out.*", "*time_emb*", "*conv_shortcut.*"),
    *("pos_embed.*", "proj_out.*", "proj_out_?.*", "*timestep_embedder*"),  # of a transformer
)
BITS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


@torch.no_grad()
def magnitudes(network: nn.Module, run: Callable[[nn.Module], object], narrow: str) -> dict[str, Amax]:
    """Magnitudes of every layer that is to be in 8 bits, by its name in the network, which stays as it is.

    run: calls the copy of the network that it is given, on inputs such as a run has. narrow: a key of BITS.
    Raises EngineError where ModelOpt is not installed.
    """
    if missing("modelopt"):
        why = "ModelOpt, which calibrates it, is not installed"
        raise EngineError(f"no {narrow} network can be built", why, "install it: pip install 'dfkd[quantise]'")
    watched = copy.deepcopy(network)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' version, which a UNet does not go through
        import modelopt.torch.quantization as mtq

        mtq.quantize(watched, _config(narrow), run)
    found = {}
    for name, layer in watched.named_modules():
        weight: Any = getattr(layer, "weight_quantizer", None)
        if weight is not None and weight.is_enabled:
            amax: Any = layer.input_quantizer.amax
            found[name] = Amax(float(amax), weight.amax.detach().float().reshape(-1))
    return found


def _config(narrow: str) -> dict[str, Any]:
    bits = BITS[narrow]
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None}},
        *({"quantizer_name": pattern, "enable": False} for pattern in WIDE),
        {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},  # it has an input, and no weights
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},  # it has weights, and no product
    ]
    return {"quant_cfg": rules, "algorithm": "max"}
