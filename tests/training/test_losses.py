"""Losses by their definitions, and a loss of one's own: one file, which acts and is part of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.errors import UsageError
from dfkd.training.losses import CrossEntropy, KullbackLeibler, Objective, Seen, kl_at_temperature, record_outputs
from dfkd.training.step import autocast
from tests.training.small_run import equal, network, run, settings, teacher

LABELS = torch.arange(8)
HINT = '''
from dataclasses import dataclass
import torch.nn.functional as F
from dfkd.training.losses import DistillLoss

@dataclass(frozen=True)
class Hint(DistillLoss):
    """The student's early maps shall have the mean of the teacher's."""

    name = "hint"
    teacher_layers = student_layers = ("0",)
    power: float = 2.0

    def __call__(self, seen):
        mine, theirs = (maps["0"].float().mean(1) for maps in (seen.student_maps, seen.teacher_maps))
        return (mine - theirs).abs().pow(self.power).mean()

def broken():
    return 1.0
'''


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 5 * torch.randn(8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seen(student: Tensor, teacher: Tensor, labels: Tensor = LABELS) -> Seen:
    return Seen(torch.zeros(8, 3, 1, 1), labels.to(student.device), student, teacher)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 30.0])
def test_kl_is_its_definition(temperature: float) -> None:
    s, t = logits(0), logits(1)
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    wanted = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert torch.isclose(KullbackLeibler(temperature=temperature)(seen(s, t)), wanted, rtol=1e-10)
    assert abs(float(kl_at_temperature(s, s + 3, temperature))) < 1e-10  # a common offset is no difference


def test_half_precision_is_judged_in_float32() -> None:
    s, t = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    assert torch.equal(kl_at_temperature(s, t, 4.0), kl_at_temperature(s.float(), t.float(), 4.0))
    assert CrossEntropy()(seen(s, t)).dtype == kl_at_temperature(s, t, 4.0).dtype == torch.float32


@pytest.mark.parametrize("temperature", [4.0, 30.0])
@pytest.mark.parametrize("rows", [8, 7])
def test_kl_has_the_bits_of_torchs_batchmean(rows: int, temperature: float) -> None:
    s, t = (logits(seed, torch.float32)[:rows] for seed in (0, 1))
    s.requires_grad_()
    q, p = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    wanted = temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    found = kl_at_temperature(s, t, temperature)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(loss, s)[0] for loss in (found, wanted)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_implementations_give_the_same_loss_and_gradient(dtype: torch.dtype, device: torch.device) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton")
    s, t = logits(0, dtype).to(device), logits(1, dtype).to(device)
    s.requires_grad_()
    losses = [KullbackLeibler(temperature=4.0, kernels=kernels)(seen(s, t)) for kernels in ("torch", "triton")]
    assert torch.isclose(losses[1], losses[0], rtol=1e-5)
    gradients = [torch.autograd.grad(loss, s)[0] for loss in losses]
    # two roundings of the kept gradient, which the backward pass divides by the batch
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_the_objective_is_the_weighted_sum() -> None:
    theirs, ours = teacher().module, network(0).eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    losses = KullbackLeibler(0.5, temperature=2.0), CrossEntropy(3.0)
    objective = Objective(theirs, ours, losses, autocast("off", torch.device("cpu")))
    found = objective(ours, images, labels)
    parts = kl_at_temperature(ours(images), theirs(images), 2.0), F.cross_entropy(ours(images), labels)
    torch.testing.assert_close(found, 0.5 * parts[0] + 3 * parts[1])
    found.backward()
    assert all(p.grad is None for p in theirs.parameters()) and all(p.grad is not None for p in ours.parameters())


def test_outputs_are_recorded_within_the_block_alone() -> None:
    own = network(0)
    with record_outputs(own, ("0", "4")) as found:
        own(torch.zeros(2, 3, 8, 8))
    assert [tuple(found[name].shape) for name in ("0", "4")] == [(2, 4, 8, 8), (2, 4, 2, 2)]
    assert not any(layer._forward_hooks for layer in own.modules())
    with (
        pytest.raises(UsageError, match="Sequential has no module 'layer3': it has 0, 1"),
        record_outputs(own, ["layer3"]),
    ):
        pass


def test_a_loss_of_ones_own_acts_and_is_part_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "hint.py"
    file.write_text(HINT)

    def trained(name: str, *losses: str, **given: Any) -> dict[str, Any]:
        return run(tmp_path / name, settings(loss=losses), teacher=teacher(), student=network(0, 8), **given)

    said: list[str] = []
    trained("without")
    with_it = trained("with", f"{file}:Hint(weight=0.5)", say=said.append)
    assert "losses: 1 kl, 0.5 hint" in said
    assert not equal(tmp_path / "without/last", tmp_path / "with/last")
    assert with_it["run"]["loss"][0]["fields"] == {"weight": 0.5, "power": 2.0}
    for other in (f"{file}:Hint(weight=0.25)", f"{file}:Hint(weight=0.5, power=1.0)"):
        with pytest.raises(UsageError, match="holds a run of other settings: loss is "):
            trained("with", other)
    changed = tmp_path / "changed" / "hint.py"
    changed.parent.mkdir()
    changed.write_text(HINT.replace("abs()", "relu()"))
    with pytest.raises(UsageError, match="holds a run of other settings: loss is "):
        trained("with", f"{changed}:Hint(weight=0.5)")
    assert trained("with", f"{file}:Hint(weight=0.5)") == with_it


def test_a_loss_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hint.py"
    file.write_text(HINT)
    for text, words in (
        (f"{file}:broken", "it gives a float, which is no distillation loss"),
        (f"{file}:Hunt", "has no 'Hunt'"),
        (f"{file}:Hint(strength=1)", "strength"),
        ("hint", "unknown distillation loss 'hint': known are kl, cross_entropy"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "out", settings(loss=(text,)))
    monkeypatch.setattr("dfkd.training.distill.check", lambda *given: type("Choice", (), {"name": "torch", "why": ""}))
    with pytest.raises(UsageError, match="hint with --compile default: it looks at layers inside"):
        run(tmp_path / "out", settings(loss=(f"{file}:Hint",), compile="default"))
