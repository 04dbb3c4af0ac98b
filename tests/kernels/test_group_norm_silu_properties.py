"""Group normalisation and SiLU on maps that hypothesis draws, judged as in test_group_norm_silu.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_group_norm_silu import BF16, F16, F32, F64, Inputs, cut_small, judge

# exp overflows in SiLU of a large negative number, which the interpreter's numpy mentions; its inverse is the 0 wanted
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@settings(deadline=None, max_examples=20)  # a busy machine is not a failure
@given(
    st.integers(0, 2), st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(1, 7), min_size=0, max_size=2),
    st.sampled_from([F64, F32, F16, BF16]), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, width, groups, sides, dtype, nhwc, gradient_nhwc, silu, many, seed):
    with pytest.MonkeyPatch.context() as patch:
        if many:
            cut_small(patch)
        judge(Inputs(batch, width * groups, tuple(sides), groups, dtype, nhwc, silu, 0.0, gradient_nhwc, seed))
