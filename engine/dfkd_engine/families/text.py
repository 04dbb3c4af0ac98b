"""Text encoders: a prompt's tokens, and the hidden states that they become."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TextEncoder:
    """A network of transformers and its tokenizer, which encode each prompt once.

    pick: what is kept of the network's outputs, which hold the hidden states of every layer. length: tokens of a
    prompt, padded or cut; 0: as many as tokenizer and network say.
    """

    def __init__(
        self, network: Any, tokenizer: Any, pick: Callable[[Any], tuple[Tensor, ...]], length: int = 0
    ) -> None:
        self.network, self.tokenizer, self.pick = network.eval().requires_grad_(False), tokenizer, pick
        config = network.config
        most = getattr(config, "max_position_embeddings", None)  # T5 has relative positions, and no such bound
        own = self.tokenizer.model_max_length
        self.length = length or (min(own, most) if most else own)
        # As in diffusers: Stable Diffusion was trained attending to the padding; a few text encoders say otherwise.
        self.masked = bool(getattr(config, "use_attention_mask", False))
        self._encoded: dict[str, tuple[Tensor, ...]] = {}

    @property
    def width(self) -> int:
        width: int = self.network.config.hidden_size
        return width

    def tokens(self, prompt: str, cut: bool = True) -> list[int]:
        """Token ids of a prompt, ends included and without padding; cut to the encoder's length unless told not to."""
        found: list[int] = self.tokenizer(prompt, truncation=cut, max_length=self.length if cut else None).input_ids
        return found

    def lost(self, prompt: str) -> str:
        """The end of a prompt that does not fit the encoder's length, "" where all of it does."""
        whole, kept = self.tokens(prompt, cut=False), self.tokens(prompt)
        if len(whole) <= len(kept):
            return ""
        text: str = self.tokenizer.decode(whole[len(kept) - 1 :], skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, ...]:
        """What is picked of the outputs for one prompt, padded or cut to `length`; each tensor [1, ...]."""
        if prompt not in self._encoded:
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).to(self.network.device)
            mask = tokens.attention_mask if self.masked else None
            outputs = self.network(tokens.input_ids, attention_mask=mask, output_hidden_states=True)
            self._encoded[prompt] = self.pick(outputs)
        return self._encoded[prompt]

    def to(self, device: torch.device | str) -> None:
        self.network.to(device)
        self._encoded.clear()
