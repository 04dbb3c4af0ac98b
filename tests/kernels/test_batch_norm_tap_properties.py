"""BatchNorm with its moments on maps that hypothesis draws, judged as in test_batch_norm_tap.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_kernels import batch_norm_launches
from tests.kernels.test_batch_norm_tap import BF16, F16, F32, F64, FORMATS, Inputs, judge

# that NaN stays NaN is tested, and the interpreter's numpy mentions them
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@settings(deadline=None, max_examples=12)  # a busy machine is not a failure
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([F64, F32, F16, BF16]), st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(FORMATS)),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(shape, dtype, order, of_y, relu, affine, small, seed):
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several parts of several tiles
            for name, value in {"TILE": 16, "PROGRAM": 64, "CHANNELS": 4, "PARTS": 2}.items():
                patch.setattr(batch_norm_launches, name, value)
        judge(Inputs(shape, dtype, order, of_y, relu, affine, seed=seed))
