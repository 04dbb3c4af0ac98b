"""Distillation's loss and its gradient: no worse than eager PyTorch of the same precision, judged in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from dfkd_kernels import soft_kl as module
from dfkd_kernels.soft_kl import soft_kl, soft_kl_ref
from tests.properties import given, settings, st

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# past a row's end there is log 0 - log 0, and series of large differences overflow: the interpreter's numpy says so
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """Logits of `size` in standard deviations; the student's half the teacher's and half its own."""

    batch: int = 4
    classes: int = 10
    dtype: torch.dtype = F32
    temperature: float = 4.0
    agreeing: bool = False
    size: float = 3.0
    strides: str = "rows"
    seed: int = 0

    def tensors(self):
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.classes)
        teacher = self.size * torch.randn(shape, generator=g)
        student = (teacher + self.size * torch.randn(shape, generator=g)) / 2
        return tuple(self.laid_out(x.to(DEVICE, self.dtype)) for x in (student, teacher))

    def laid_out(self, x):
        if self.strides == "wider":  # a part of the columns of a wider matrix
            return F.pad(x, (3, 2))[:, 3:-2]
        if self.strides == "columns":
            return x.t().contiguous().t()
        return x

    @property
    def options(self):
        return self.temperature, self.agreeing


def eager(student, teacher, temperature, agreeing):
    """Losses [B] by PyTorch's own functions, float32 at least."""
    s, t = (x if x.element_size() >= 4 else x.float() for x in (student, teacher))
    q, p = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
    losses = temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    return torch.where(s.argmax(1) == t.argmax(1), losses, 0) if agreeing else losses


def with_gradient(function, student, *others):
    """Losses, and the gradient of their mean, as a run asks for it."""
    leaf = student.detach().requires_grad_()
    losses = function(leaf, *others)
    (gradient,) = torch.autograd.grad(losses.mean() if len(losses) else losses.sum(), leaf)
    return losses.detach(), gradient


def judge(i):
    """Within what eager errs by, one rounding of the result, and three of float32: on few values eager may be lucky.

    Those are roundings of what is added up: terms p d and q - p, as large as four times their sum; and p and q, of
    which a gradient is the difference.
    """
    student, teacher = i.tensors()
    truth = with_gradient(eager, student.double(), teacher.double(), *i.options)
    expected = with_gradient(eager, student, teacher, *i.options)
    found = with_gradient(soft_kl, student, teacher, *i.options)
    shares = torch.cat([(x / i.temperature).double().softmax(1) for x in (teacher, student)])
    shares *= i.temperature / max(1, i.batch)
    for mine, plain, exact, added in zip(found, expected, truth, (truth[0], shares), strict=True):
        assert mine.shape == plain.shape and mine.dtype == plain.dtype
        if not mine.numel():
            continue
        error, allowed = ((x.double() - exact).abs().max() for x in (mine, plain))
        if i.dtype == F64:  # eager is all there is to judge by: T^2 times the rounding of log p
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)
            continue
        rounding = torch.finfo(mine.dtype).eps * exact.abs().max() + 3 * torch.finfo(F32).eps * added.abs().max()
        assert error <= allowed + rounding, (error, allowed, rounding)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize(
    "batch, classes", [(1, 1), (5, 2), (7, 10), (3, 101), (2, 1000), (1, 21841)]
)  # minimal, few, CIFAR, prime, ImageNet, ImageNet-21k, whose rows are read twice
def test_no_worse_than_eager(batch, classes, dtype):
    judge(Inputs(batch, classes, dtype))
    judge(Inputs(batch, classes, dtype, temperature=30.0))


@pytest.mark.parametrize("block", [4, 16])
def test_only_rows_that_agree_count(block, monkeypatch):
    """On the class itself, be it in another block of a wide row; of several largest logits the first counts."""
    monkeypatch.setattr(module, "WIDEST", block)
    student, teacher = torch.zeros(2, 5, 11, device=DEVICE)
    for row, (s, t) in enumerate([(1, 5), (5, 5), (9, 1), (9, 9)]):
        student[row, s], teacher[row, t] = 2.0, 3.0
    student[4, 6] = student[4, 10] = 2.0
    teacher[4, 6] = 3.0
    losses, gradient = with_gradient(soft_kl, student, teacher, 1.0, True)
    assert (losses > 0).tolist() == gradient.any(1).tolist() == [False, True, False, True, True]
    every, _ = with_gradient(soft_kl, student, teacher, 1.0, False)
    assert torch.equal(losses, torch.where(losses > 0, every, 0)) and (every > 0).all()


def test_teacher_and_student_of_different_precisions():
    student, teacher = Inputs().tensors()
    for s, t in ((F16, F32), (F32, BF16), (F32, F64)):
        losses, gradient = with_gradient(soft_kl, student.to(s), teacher.to(t), 4.0, False)
        assert losses.dtype == (F64 if F64 in (s, t) else F32) and gradient.dtype == s
        exact, _ = with_gradient(eager, student.to(s).double(), teacher.to(t).double(), 4.0, False)
        torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", ["wider", "columns"])
def test_strides_change_nothing(strides):
    i = Inputs(5, 33)
    student, teacher = i.tensors()
    others = Inputs(5, 33, strides=strides).tensors()
    assert others[0].stride() not in ((33, 1), student.stride())
    for mine, theirs in zip(
        with_gradient(soft_kl, *others, *i.options),
        with_gradient(soft_kl, student, teacher, *i.options),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    one = soft_kl(student[:1].expand(5, -1), teacher[:1].expand(5, -1))
    assert torch.equal(one, soft_kl(student[:1], teacher[:1]).expand(5))


def test_the_reference_is_its_definition():
    """The written gradient against autograd, and the losses against finite differences."""
    for i in (Inputs(3, 5, F64), Inputs(4, 5, F64, 1.0, agreeing=True)):
        student, teacher = i.tensors()
        losses, gradient = soft_kl_ref(student, teacher, *i.options)
        leaf = student.requires_grad_()
        wanted = eager(leaf, teacher, *i.options)
        torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
        (wanted,) = torch.autograd.grad(wanted.sum(), leaf)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda s, t=teacher, i=i: soft_kl_ref(s, t, *i.options)[0], leaf)


@pytest.mark.parametrize("interpreted", [True, False])
def test_operator(interpreted, monkeypatch):
    """Checked for autograd, fake tensors and the compiler; where no interpreter runs the CPU has the reference."""
    if not interpreted and DEVICE.type == "cpu":
        monkeypatch.setattr(module, "interpreted", lambda x: False)
    student, teacher = Inputs(3, 5, F64).tensors()
    student.requires_grad_()
    for options in ((4.0, False), (1.0, True)):
        torch.library.opcheck(module._operator, (student, teacher, *options))
    assert torch.autograd.gradcheck(lambda s: soft_kl(s, teacher, 4.0), student)
    for half in (F16, BF16):
        judge(Inputs(3, 5, half))


def test_the_teacher_gets_no_gradient_and_a_second_derivative_is_refused():
    student, teacher = Inputs().tensors()
    student.requires_grad_(), teacher.requires_grad_()
    loss = soft_kl(student, teacher, 4.0).sum()
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(once, again)
    (nothing,) = torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True)
    assert nothing is None
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_equal_rows_have_no_loss_whatever_their_size():
    for size in (0.0, 1.0, 1e4):
        student, _ = Inputs(size=size).tensors()
        for temperature in (1.0, 30.0):
            losses, gradient = with_gradient(soft_kl, student, student.clone(), temperature)
            assert (losses == 0).all() and (gradient == 0).all()


def test_large_logits():
    """Far apart: no overflow, and the classes that lose have no share."""
    top = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, -1e4]], device=DEVICE)
    losses, gradient = with_gradient(soft_kl, top, top.flip(0))
    assert losses.tolist() == [1e4, 1e4]
    assert (2 * gradient).tolist() == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]


def test_classes_that_are_ruled_out():
    """By the teacher: no part. By the student alone: an infinite loss. By both: as if they were not there."""
    none = -torch.inf
    teacher = torch.tensor([[none, 0.0, none], [0.0, 1.0, 2.0], [none, 1.0, 3.0], [none, none, none]], device=DEVICE)
    student = torch.tensor([[1.0, 2.0, 1.0], [none, 1.0, 2.0], [none, 2.0, 3.0], [1.0, 2.0, 3.0]], device=DEVICE)
    for implementation in (soft_kl, lambda s, t: soft_kl_ref(s, t, 1.0)[0]):
        losses, gradient = with_gradient(implementation, student, teacher)
        assert torch.isclose(losses[0], -student[0].log_softmax(0)[1])  # one-hot: the cross-entropy
        assert losses[1] == torch.inf and losses[3].isnan()
        two = [x[2:3, 1:].double() for x in (student, teacher)]
        assert torch.isclose(losses[2].double(), soft_kl_ref(*two, 1.0)[0][0])
        assert gradient[:3].isfinite().all() and gradient[2, 0] == 0


def test_the_difference_of_sure_answers_keeps_its_digits():
    """Eager float32 has no digit of the difference between probabilities 1 - 1e-9 and 1 - 2e-9."""
    student, teacher = (torch.tensor([[x, 0.0, -1.0]], device=DEVICE) for x in (21.0, 20.0))
    exact = with_gradient(eager, student.double(), teacher.double(), 1.0, False)
    for mine, wanted in zip(with_gradient(soft_kl, student, teacher), exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=0)


def test_the_loss_of_nearly_equal_answers_keeps_its_digits():
    """At T = 30, where p log p - p log q is a small difference; relative to the loss eager float32 errs by 1e-5."""
    student, teacher = Inputs(8, 1000).tensors()
    exact = eager(student.double(), teacher.double(), 30.0, False)
    torch.testing.assert_close(soft_kl(student, teacher, 30.0).double(), exact, rtol=1e-6, atol=0)


def test_small_gradients_of_float16_survive_until_the_loss_scale_lifts_them():
    student = torch.tensor([[21.0, 0.0, -1.0]], device=DEVICE, dtype=F16)
    teacher = student - torch.tensor([1.0, 0.0, 0.0], device=DEVICE, dtype=F16)
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_kl(leaf, teacher, 1.0).sum() * 2**16, leaf)
    exact = soft_kl_ref(student.detach().double(), teacher.double(), 1.0)[1] * 2**16
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-3, atol=0)
    assert (exact / 2**16).abs().max() < torch.finfo(F16).smallest_normal / 2**10  # nothing without


@pytest.mark.parametrize("temperature", [1.0, 30.0, 1e5])
def test_no_float16_gradient_overflows(temperature):
    """Two sure answers that disagree have the largest there is, T."""
    student = torch.tensor([[6e4, 0.0]], device=DEVICE, dtype=F16)
    _, stored = module._operator(student, student.flip(1), temperature, False)
    assert stored.isfinite().all() and stored.abs().max() <= 2**15


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student": torch.zeros(3)}, r"student: \(3,\) torch.float32; want \[B, C"),
        ({"student": torch.zeros(3, 0)}, r"student: \(3, 0\)"),
        ({"student": torch.zeros(3, 4, dtype=torch.int64)}, "int64; want .* floating"),
        ({"teacher": torch.zeros(3, 5)}, r"teacher: \(3, 5\) .* want \(3, 4\)"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"teacher": torch.zeros(3, 4, device="meta")}, "teacher: .* on meta"),
    ],
)
def test_refusals(change, message):
    given = {"student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "temperature": 2.0} | change
    with pytest.raises(ValueError, match=message):
        soft_kl(**given)


@settings(deadline=None, max_examples=25)  # a busy machine is not a failure
@given(
    st.integers(0, 5), st.integers(1, 37), st.sampled_from([F64, F32, F16, BF16]),
    st.sampled_from([0.5, 1.0, 3.0, 30.0]), st.booleans(), st.sampled_from(["rows", "wider", "columns"]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, classes, dtype, temperature, agreeing, strides, narrow, seed):
    with pytest.MonkeyPatch.context() as patch:
        if narrow:  # rows that a program goes through in blocks of four
            patch.setattr(module, "WIDEST", 4)
        judge(Inputs(batch, classes, dtype, temperature, agreeing, strides=strides, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("batch, classes", [(256, 10), (257, 100), (256, 1000), (64, 8192), (64, 21841)])
def test_natively_at_run_size(batch, classes, dtype):
    judge(Inputs(batch, classes, dtype))
    judge(Inputs(batch, classes, dtype, temperature=30.0))
    judge(Inputs(batch, classes, dtype, temperature=1.0, agreeing=True))
