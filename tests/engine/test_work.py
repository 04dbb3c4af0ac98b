"""FLOP and bytes of functions whose work is known, and rooflines made of them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dfkd_engine.work import Operation, Work, work
from tests.synthesis.small_networks import classifier


def product(rows: int) -> torch.Tensor:
    """[rows, 8] x [8, 4]: 2 x 8 x 4 FLOP a row; reads rows x 8 and 8 x 4 floats and writes rows x 4."""
    return torch.ones(rows, 8) @ torch.ones(8, 4)


def test_a_product():
    found = work(product, 10)
    dense = [operation for operation in found.operations if operation.flop]
    assert dense == [Operation(2 * 10 * 8 * 4, 4 * (10 * 8 + 8 * 4 + 10 * 4), "float32")]
    assert found.flop == 640 and found.launches(fused=True) == 1
    assert found.launches() == 3  # and two that fill the inputs
    assert found.bytes == 4 * (10 * 8 + 8 * 4 + 10 * 4) + 4 * (10 * 8 + 8 * 4)


def test_views_move_nothing_and_an_expanded_tensor_is_read_once():
    source = torch.ones(1, 16)
    assert not work(lambda rows: source.expand(rows, 16).t().reshape(16, rows)[:4].detach(), 1).operations
    (found,) = work(lambda rows: source.expand(rows, 16) + 1, 100).operations
    assert found == Operation(0, 4 * (16 + 100 * 16), "float32")
    (found,) = work(lambda rows: source.add_(1), 1).operations  # read, and written in its place
    assert found.bytes == 2 * 4 * 16


def test_the_backward_pass_counts():
    weight = torch.ones(6, 6, 3, 3)

    def gradient(rows: int) -> torch.Tensor:
        leaf = torch.ones(rows, 6, 8, 8, requires_grad=True)
        return torch.autograd.grad(F.conv2d(leaf, weight, padding=1).sum(), leaf)[0]

    assert (
        work(gradient, 5).flop == 2 * work(lambda rows: F.conv2d(torch.ones(rows, 6, 8, 8), weight, padding=1), 5).flop
    )


@pytest.mark.parametrize("shape", [(2, 4, 64, 16), (1, 1, 8, 8)])
def test_attention_is_counted_where_it_is_fused(shape):
    """The CPU's fused attention, which torch's own counter does not know, as two products."""
    batch, heads, tokens, width = shape

    def attention(rows: int) -> torch.Tensor:
        q = torch.ones(rows * batch, heads, tokens, width, requires_grad=True)
        return torch.autograd.grad(F.scaled_dot_product_attention(q, q.detach(), q.detach()).sum(), q)[0]

    forward = 2 * 2 * batch * heads * tokens * tokens * width
    found = work(attention, 3)
    assert found.flop >= 3 * forward * 3  # the backward pass has four or five products more
    assert found.flop % (3 * forward / 2) == 0


def test_a_network_as_torch_counts_it():
    teacher = classifier()
    images = torch.ones(4, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        teacher.logits(images)
    assert work(lambda rows: teacher.logits(torch.ones(rows, 3, 16, 16)), 4).flop == counter.get_total_flops()


def test_work_is_in_proportion_and_costs_no_memory():
    found = [work(lambda rows: torch.ones(rows, 2**20) * 2, rows) for rows in (1, 2**20)]  # 4 TiB
    assert found[1].bytes == 2**20 * found[0].bytes


def test_a_function_that_asks_for_values_is_run_with_one_row():
    rows_seen = []

    def asks(rows: int) -> torch.Tensor:
        rows_seen.append(rows)
        x = torch.ones(rows, 8)
        return product(rows) if float(x.sum()) > 0 else x

    assert work(asks, 7).flop == 7 * product_flop(1) and rows_seen == [7, 1]


def product_flop(rows: int) -> int:
    return 2 * rows * 8 * 4


def test_a_roofline_is_the_slower_of_two_for_every_operation():
    arithmetic, traffic, norm = (Operation(*each) for each in ((100, 1, "float16"), (1, 100, "float16"), (0, 50, "x")))
    found = Work({arithmetic: 2, traffic: 1, norm: 3})
    peaks = {"float16": 10.0}
    assert found.seconds(peaks, 10.0, fused=True) == 2 * 10 + 10
    assert found.seconds(peaks, 10.0) == 2 * 10 + 10 + 3 * 5
    assert found.scaled(2.5).seconds(peaks, 10.0) == 2.5 * 45
    assert found.scaled(2).flop == 402 and found.scaled(2).bytes == 2 * 252 and found.scaled(2).launches() == 12
    with pytest.raises(KeyError, match="float16"):
        found.seconds({"float32": 1.0}, 10.0)
