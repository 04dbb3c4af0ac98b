"""Attention: auto takes xformers only where it has an operator, and says why; both processors fit a UNet and a VAE.

The choice needs no diffusers, so what does imports it itself.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dfkd_engine import attention
from dfkd_engine.attention import Attention, choose_attention, set_attention
from dfkd_engine.errors import EngineError


def like_xformers(supports):
    """xformers.ops as far as it is used: batch, tokens, channels; no operator where ``supports`` says so."""

    def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
        if not supports(query):
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    return package, ops


@pytest.fixture
def xformers(monkeypatch):
    def install(supports):
        package, ops = like_xformers(supports)
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        monkeypatch.setattr(attention, "missing", lambda name: [])
        monkeypatch.setattr(attention, "versions", lambda name: {name: "9.9"})

    return install


def test_without_xformers(monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda name: [name])
    chosen = choose_attention("auto", "cpu")
    assert chosen == Attention("sdpa", "xformers is not installed (pip install 'dfkd[gpu]')")
    with pytest.raises(EngineError, match=r"xformers cannot be used: xformers is not installed"):
        choose_attention("xformers", "cpu")
    assert choose_attention("sdpa", "cpu").name == "sdpa"


def test_an_operator_decides(xformers):
    xformers(lambda query: query.dtype == torch.float16)
    chosen = choose_attention("auto", "cpu")
    assert chosen == Attention("sdpa", "xformers has no operator for float32 on cpu")
    assert choose_attention("auto", "cpu", torch.float16).name == "xformers"
    assert choose_attention("xformers", "cpu", torch.float16) == Attention("xformers", "as asked")
    with pytest.raises(EngineError, match="no operator for float32 on cpu"):
        choose_attention("xformers", "cpu")


def test_unknown_name():
    with pytest.raises(EngineError, match="'flash' is unknown: known are auto, sdpa, xformers"):
        choose_attention("flash", "cpu")


@pytest.mark.parametrize("name, kind", [("sdpa", "AttnProcessor2_0"), ("xformers", "XFormersAttnProcessor")])
def test_every_layer_uses_it_and_agrees(xformers, monkeypatch, name, kind):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models import attention_processor

    from tests.tiny_sd import UNET, VAE

    xformers(lambda query: True)
    monkeypatch.setattr(attention_processor, "xformers", sys.modules["xformers"], raising=False)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET | {"sample_size": 8}).eval()
    vae = AutoencoderKL(**VAE).eval()
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    unet.set_attn_processor(attention_processor.AttnProcessor())
    vae.set_attn_processor(attention_processor.AttnProcessor())
    with torch.no_grad():
        plain = unet(z, 5, context).sample, vae.decode(z).sample
        assert set_attention(unet, name) > 10 and set_attention(vae, name) == 2
        wanted = getattr(attention_processor, kind)
        assert all(type(p) is wanted for net in (unet, vae) for p in net.attn_processors.values())
        # the same sums in another order, through a few dozen layers
        torch.testing.assert_close(unet(z, 5, context).sample, plain[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(vae.decode(z).sample, plain[1], rtol=0, atol=1e-5)


def test_a_network_without_attention_is_left_as_it_is():
    from diffusers import AutoencoderTiny

    from tests.tiny_sd import TINY_VAE

    assert set_attention(AutoencoderTiny(**TINY_VAE), "sdpa") == 0


def test_a_foreign_processor_keeps_torchs_attention_and_refuses_another():
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

    from tests.tiny_sd import UNET

    unet = UNet2DConditionModel(**UNET)
    unet.set_attn_processor(AttnAddedKVProcessor2_0())
    assert set_attention(unet, "sdpa") == 0
    assert all(isinstance(found, AttnAddedKVProcessor2_0) for found in unet.attn_processors.values())
    with pytest.raises(EngineError, match="is a AttnAddedKVProcessor2_0"):
        set_attention(unet, "xformers")


@pytest.mark.gpu
def test_on_a_gpu_auto_says_what_it_found():
    chosen = choose_attention("auto", "cuda", torch.float16)
    assert chosen.reason and chosen.name in ("sdpa", "xformers")
