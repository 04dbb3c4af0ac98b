"""Distillation's loss on shapes, precisions and strides that hypothesis draws, judged as in test_soft_kl.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_kernels import soft_kl as module
from tests.kernels.test_soft_kl import BF16, F16, F32, F64, Inputs, judge

# past a row's end there is log 0 - log 0, which the interpreter's numpy mentions
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@settings(deadline=None, max_examples=25)  # a busy machine is not a failure
@given(
    st.integers(0, 5), st.integers(1, 37), st.sampled_from([F64, F32, F16, BF16]),
    st.sampled_from([0.5, 1.0, 3.0, 30.0]), st.sampled_from([0.0, 0.3, 10.0]), st.booleans(),
    st.sampled_from(["rows", "wider", "columns"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, classes, dtype, temperature, weight, agreeing, strides, narrow, seed):
    with pytest.MonkeyPatch.context() as patch:
        if narrow:  # rows that a program goes through in blocks of four
            patch.setattr(module, "WIDEST", 4)
            patch.setattr(module, "BLOCK", 4)
        judge(Inputs(batch, classes, dtype, temperature, weight, agreeing, strides=strides, seed=seed))
