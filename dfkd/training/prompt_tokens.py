"""Prompts of a text-conditional prior: which there are, and a tokenizer that has their words whole."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dfkd.synthesis.prompts import prompt_of

LEAST = 16  # tokens of a prompt


class Prompts:
    """Every prompt of a training: `templates` for each class, then those of images whose class is left out.

    texts: all of them. The prompt of class c in template k is number k C + c of C classes.
    """

    def __init__(self, templates: Sequence[str], free: Sequence[str], class_names: Sequence[str]) -> None:
        self.classes, self.templates = len(class_names), len(templates)
        self.texts = [prompt_of(template, name) for template in templates for name in class_names]
        self.texts += ["", *free]
        self.free = 1 + len(free)

    def draw(self, labels: Tensor, drop: float) -> Tensor:
        """Numbers int64 [B] of random prompts for images of these classes; a share `drop` is without a class."""
        count, device = len(labels), labels.device
        told = torch.randint(self.templates, (count,), device=device) * self.classes + labels
        untold = self.templates * self.classes + torch.randint(self.free, (count,), device=device)
        return torch.where(torch.rand(count, device=device) < drop, untold, told)


def make_tokenizer(prompts: Prompts) -> Any:
    """A CLIP byte-pair tokenizer that has the prompts' words whole and every other word in bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for text in prompts.texts for word in re.findall(r"[a-z]+", text.lower())):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = list(dict.fromkeys(vocabulary))
    vocab = {token: i for i, token in enumerate(vocabulary)}
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    with TemporaryDirectory() as scratch:  # the class reads files alone
        folder = Path(scratch)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(lines, encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    longest = max(len(tokenizer(text).input_ids) for text in prompts.texts)
    tokenizer.model_max_length = max(LEAST, -(-longest // 8) * 8)
    return tokenizer


def token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """int64 [N, length] of N texts, padded or cut."""
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids
