import pytest
import torch
from torch import Tensor

from dfkd.distillation.losses import cross_entropy, kl_at_temperature


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 5 * torch.randn(8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_kl_is_its_definition(temperature: float) -> None:
    s, t = logits(0), logits(1)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert torch.isclose(kl_at_temperature(s, t, temperature), wanted, rtol=1e-10)


def test_kl_is_zero_for_equal_distributions_and_ignores_a_common_offset() -> None:
    s = logits(0)
    assert abs(float(kl_at_temperature(s, s + 3, 4.0))) < 1e-10


def test_at_high_temperature_kl_is_half_the_squared_distance_of_centred_logits() -> None:
    """Hinton et al., section 2.1: T^2 KL -> ||s - t||^2 / (2 C) for zero-mean logits as T grows."""
    s, t = (x - x.mean(1, keepdim=True) for x in (logits(0), logits(1)))
    wanted = (s - t).square().sum(1).mean() / (2 * 10)
    # The next term of the expansion is smaller by about max|logit| / T.
    assert torch.isclose(kl_at_temperature(s, t, 1e4), wanted, rtol=1e-2)


def test_half_precision_is_judged_in_float32() -> None:
    s, t = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    assert kl_at_temperature(s, t, 4.0).dtype == torch.float32
    assert torch.equal(kl_at_temperature(s, t, 4.0), kl_at_temperature(s.float(), t.float(), 4.0))
    assert cross_entropy(s, torch.arange(8)).dtype == torch.float32
