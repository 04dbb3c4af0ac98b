"""Random numbers as a function of what they are for."""

import hashlib

import torch


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """63 bits that follow from the run's seed, a purpose ("order", "view", ...) and a counter (epoch or step).

    A hash, so that neighbouring seeds or steps share nothing; a resumed run needs no generator's state.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global(seed: int, device: torch.device) -> None:
    """Seed the generators that layers such as dropout draw from on ``device``."""
    # torch.manual_seed() also formats a stack trace for every kind of device: too slow for once a step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator with the derived seed."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))
