"""Text encoders: a prompt's tokens, and the hidden states that they become."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_engine.errors import EngineError


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
        self._words = set(tokenizer.added_tokens_encoder)  # before any that textual inversion may add
        self._encoded: dict[str, tuple[Tensor, ...]] = {}

    @property
    def width(self) -> int:
        width: int = self.network.config.hidden_size
        return width

    def tokens(self, prompt: str, cut: bool = True) -> list[int]:
        """Token ids of a prompt, ends included and without padding; cut to the encoder's length unless told not to."""
        length = self.length if cut else None
        found: list[int] = self.tokenizer(
            self._written(prompt), truncation=cut, max_length=length, verbose=False
        ).input_ids
        return found

    def lost(self, prompt: str) -> str:
        """The end of a prompt that does not fit the encoder's length, "" where all of it does."""
        whole, kept = self.tokens(prompt, cut=False), self.tokens(prompt)
        if len(whole) <= len(kept):
            return ""
        text: str = self.tokenizer.decode(whole[len(kept) - 1 :], skip_special_tokens=True)
        return text.strip()

    def strange(self, prompt: str) -> bool:
        """Whether a prompt has something that the tokenizer has no token for."""
        tokens, unknown = self.tokens(prompt), self.tokenizer.unk_token_id
        ends = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
        return unknown in [token for i, token in enumerate(tokens) if 0 < i < len(tokens) - 1 or token not in ends]

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, ...]:
        """What is picked of the outputs for one prompt, padded or cut to `length`; each tensor [1, ...]."""
        if prompt not in self._encoded:
            # Not on the device: of a thousand classes those of Stable Diffusion 3 are gigabytes.
            self._encoded[prompt] = tuple(tensor.cpu() for tensor in self.encode([prompt]))
        return tuple(tensor.to(self.network.device) for tensor in self._encoded[prompt])

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What is picked of the outputs for B prompts, each tensor [B, ...]; differentiable, and nothing is kept."""
        padded = [self.padded(prompt).to(self.network.device) for prompt in prompts]
        mask = torch.cat([tokens.attention_mask for tokens in padded]) if self.masked else None
        ids = torch.cat([tokens.input_ids for tokens in padded])
        return self.pick(self.network(ids, attention_mask=mask, output_hidden_states=True))

    def _written(self, prompt: str) -> str:
        """The prompt with every embedding of a word that textual inversion gave several; diffusers' own conversion."""
        if self._words >= set(self.tokenizer.added_tokens_encoder):
            return prompt
        from diffusers.loaders import TextualInversionLoaderMixin

        converted: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)
        return converted

    def padded(self, prompt: str) -> Any:
        """input_ids and attention_mask [1, length] of a prompt. Raises EngineError: the network lacks a token."""
        written, fit = self._written(prompt), {"max_length": self.length, "truncation": True}
        tokens = self.tokenizer(written, padding="max_length", return_tensors="pt", **fit)
        known, highest = self.network.config.vocab_size, int(tokens.input_ids.max())
        if highest >= known:
            fact = f"the tokenizer has token {highest} in {prompt!r}, and the text encoder's vocab_size is {known}"
            raise EngineError(fact, "they are not of one model", "use a prior whose tokenizer is its text encoder's")
        return tokens

    def to(self, device: torch.device | str) -> None:
        self.network.to(device)
        self._encoded.clear()
