"""What a denoiser is told of an image's class: its number, tokens or embeddings of a prompt, or nothing."""

from typing import Any

import torch
from torch import Tensor, nn

from dfkd.training.prompt_tokens import Prompts, token_ids


class Conditions:
    """No condition, and the base of the others; all on the device."""

    kind = "none"

    def draw(self, labels: Tensor, drop: float) -> tuple[Tensor, ...]:
        """The condition of images of these classes, int64 [B]; that of a random share `drop` says nothing of them."""
        return ()

    def of(self, labels: Tensor) -> tuple[Tensor, ...]:
        """The condition that the finished prior is given for a class."""
        return ()

    def free(self, count: int) -> tuple[Tensor, ...]:
        """The condition that says nothing, () where there is none."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What dfkd.json says of it."""
        return {}


class ClassNumbers(Conditions):
    """Class numbers; number K of K classes says nothing."""

    kind = "class"

    def __init__(self, labels: tuple[str, ...], device: torch.device) -> None:
        self._labels, self._device = labels, device

    def draw(self, labels: Tensor, drop: float) -> tuple[Tensor, ...]:
        dropped = torch.rand(len(labels), device=labels.device) < drop
        return (torch.where(dropped, len(self._labels), labels),)

    def of(self, labels: Tensor) -> tuple[Tensor, ...]:
        return (labels,)

    def free(self, count: int) -> tuple[Tensor, ...]:
        return (torch.full((count,), len(self._labels), device=self._device),)

    def facts(self) -> dict[str, Any]:
        return {"prompt": "{label}", "labels": list(self._labels), "null_class": len(self._labels)}


class Words(Conditions):
    """Prompts: as token ids for a text encoder that learns too, else as embeddings of a frozen one.

    labels: words that the prior states as all it knows; () where it takes any.
    """

    kind = "text"

    def __init__(
        self,
        prompts: Prompts,
        prompt: str,
        labels: tuple[str, ...],
        tokenizer: Any,
        length: int,
        device: torch.device,
        frozen: nn.Module | None = None,
    ) -> None:
        self._prompts, self._prompt, self._labels, self._frozen = prompts, prompt, labels, frozen
        self._tokens = token_ids(tokenizer, prompts.texts, length).to(device)
        self._empty = prompts.texts.index("")

    @property
    def tokens(self) -> Tensor:
        """Token ids int64 [P, L] of every prompt."""
        return self._tokens

    def draw(self, labels: Tensor, drop: float) -> tuple[Tensor, ...]:
        return self._told(self._prompts.draw(labels, drop))

    def of(self, labels: Tensor) -> tuple[Tensor, ...]:
        return self._told(labels)  # of the first template

    def free(self, count: int) -> tuple[Tensor, ...]:
        return self._told(torch.full((count,), self._empty, device=self._tokens.device))

    def facts(self) -> dict[str, Any]:
        return {"prompt": self._prompt, **({"labels": list(self._labels)} if self._labels else {})}

    def _told(self, numbers: Tensor) -> tuple[Tensor, ...]:
        tokens = self._tokens[numbers]
        if self._frozen is None:
            return (tokens,)
        with torch.no_grad():
            return (self._frozen(tokens).last_hidden_state,)
