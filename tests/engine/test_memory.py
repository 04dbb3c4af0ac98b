"""Bytes that are counted, against functions whose bytes are known and against the allocator of the CPU."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from dfkd_engine.memory import (
    ELEMENT_LIMIT,
    Footprint,
    footprint,
    halved,
    most_rows,
    shared,
    weight_bytes,
)
from tests.engine import small_graphs

KIB = 1024


def relu_chain(rows: int) -> Tensor:
    """Two tensors of 1 KiB a row live at once, however long the chain."""
    x = torch.zeros(rows, 256)
    for _ in range(5):
        x = torch.relu(x)
    return x


def saved_chain(rows: int) -> Tensor:
    """Autograd keeps every one of five results of 1 KiB a row; the backward pass holds two gradients more."""
    leaf = torch.zeros(rows, 256, requires_grad=True)
    x = leaf
    for _ in range(5):
        x = torch.sigmoid(x)
    (gradient,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
    return gradient


def with_a_constant(rows: int) -> Tensor:
    table = torch.zeros(1024)
    return torch.zeros(rows, 256) + table[:256]


@pytest.mark.parametrize("without_data", [True, False])
@pytest.mark.parametrize(
    "call, fixed, row", [(relu_chain, 0, 2 * KIB), (saved_chain, 0, 9 * KIB), (with_a_constant, 4 * KIB, 2 * KIB)]
)
def test_bytes_that_are_known(call: Callable[[int], Tensor], fixed: int, row: int, without_data: bool) -> None:
    found = footprint(call, without_data)
    assert (found.fixed, found.row, found.flop) == (fixed, row, 0)
    assert found.elements == (512 if call is with_a_constant else 256)  # the table is larger than two rows


def test_flop_of_a_row_with_the_fused_attention_of_a_cpu() -> None:
    assert footprint(lambda rows: torch.ones(rows, 8) @ torch.ones(8, 4), True).flop == 2 * 8 * 4

    def attention(rows: int) -> Tensor:
        q = torch.ones(rows, 2, 64, 16)
        return F.scaled_dot_product_attention(q, q, q)

    assert footprint(attention, True).flop == 2 * 2 * 2 * 64 * 64 * 16

    def gradients(rows: int) -> object:
        q, k, v = (torch.ones(rows, 2, 64, 16, requires_grad=True) for _ in range(3))
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))

    fused = footprint(gradients, True).flop
    with sdpa_kernel(SDPBackend.MATH):  # which keeps the scores, and does not form them again
        assert fused == footprint(gradients, True).flop == 3 * 2 * 2 * 2 * 64 * 64 * 16


@pytest.mark.parametrize("without_data", [True, False])
def test_weights_and_their_views_are_not_a_call(without_data: bool) -> None:
    layer = nn.Linear(300, 7)  # its weight is transposed in the call, a view of more elements than a row has
    with torch.no_grad():
        found = footprint(lambda rows: layer(torch.zeros(rows, 300)), without_data)
    assert (found.fixed, found.row, found.elements) == (0, 4 * 307, 300)
    assert weight_bytes(layer, layer, nn.BatchNorm2d(3)) == 4 * 2107 + 4 * 4 * 3 + 8


def test_a_function_that_asks_for_values_is_run_as_it_is_and_one_that_fails_says_so() -> None:
    def asks(rows: int) -> Tensor | None:
        x = torch.zeros(rows, 256)
        return x + 1 if float(x.sum()) == 0 else None

    assert footprint(asks, without_data=True).elements == 256

    def fails(rows: int) -> None:
        raise LookupError("of its own")

    with pytest.raises(LookupError, match="of its own"):
        footprint(fails, without_data=True)


def peak_of_the_allocator(call: Callable[[int], object], rows: int) -> int:
    """Most bytes that torch's CPU allocator had given out during a call, over those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call(rows)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("network", ["unet", "gradient"])
def test_against_the_allocator_of_the_cpu(network: str) -> None:
    """At least what was counted from one row and two, and little more: the scratch memory of single kernels."""
    function = small_graphs.networks().function(network)

    @torch.no_grad()
    def call(rows: int) -> object:
        return function(*small_graphs.arguments(network, rows))

    call(1)
    found = footprint(call, without_data=False)
    assert footprint(call, without_data=True) == found
    counted, real = found.bytes(256), peak_of_the_allocator(call, 256)
    assert 0.99 * counted <= real <= 1.25 * counted


# --- rows of a call -------------------------------------------------------------------------------------------------
def test_rows_that_fit_and_that_calls_share() -> None:
    needs = Footprint(100, 10, 1)
    assert needs.bytes(5) == 150 and needs.most_rows(155) == 5 and needs.most_rows(10) == 0
    assert [shared(10, most) for most in (10, 9, 4, 3, 1, 0)] == [10, 5, 4, 3, 1, 1]
    assert [halved(rows) for rows in (64, 3, 2)] == [32, 1, 1]


@pytest.mark.parametrize("elements, rows", [(1, ELEMENT_LIMIT), (ELEMENT_LIMIT, 1), (ELEMENT_LIMIT + 1, 0), (2**30, 1)])
def test_most_rows_is_the_last_that_fits(elements: int, rows: int) -> None:
    assert most_rows(elements) == rows
