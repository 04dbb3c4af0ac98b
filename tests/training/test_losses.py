import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.training.losses import cross_entropy, distillation_loss, kl_at_temperature


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


@pytest.mark.parametrize("temperature", [4.0, 30.0])
@pytest.mark.parametrize("rows", [8, 7])
def test_kl_has_the_bits_of_torchs_batchmean(rows: int, temperature: float) -> None:
    """A student trained on a CPU is the one that was trained before the loss had other implementations."""
    s, t = (logits(seed, torch.float32)[:rows] for seed in (0, 1))
    s.requires_grad_()
    q, p = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    wanted = temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    found = kl_at_temperature(s, t, temperature)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(loss, s)[0] for loss in (found, wanted)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_both_implementations_give_the_same_loss_and_gradient(
    ce_weight: float, dtype: torch.dtype, device: torch.device
) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton")
    s, t, labels = logits(0, dtype).to(device), logits(1, dtype).to(device), torch.arange(8, device=device)
    s.requires_grad_()
    losses = [distillation_loss(s, t, 4.0, labels, ce_weight, kernels) for kernels in ("torch", "triton")]
    wanted = kl_at_temperature(s, t, 4.0) + ce_weight * cross_entropy(s, labels)
    assert torch.equal(losses[0], wanted)
    assert torch.isclose(losses[1], wanted, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, s)[0] for loss in losses]
    # two roundings of the kept gradient, which the backward pass divides by the batch
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=2 * torch.finfo(dtype).eps)
