"""The launches of a guided step on latents that hypothesis draws, judged as in test_guided_step.py."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_guided_step import LAUNCHES, NCHW, NHWC, Inputs, judge


@settings(deadline=None, max_examples=10)  # a busy machine is not a failure
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 5), st.sampled_from([1, 2]), st.sampled_from([NCHW, NHWC]), st.sampled_from(["rms", "none"]),
    st.integers(0, 99), st.sampled_from(list(LAUNCHES)),
)  # fmt: skip
def test_any_shape(shape, micro, copies, order, norm, seed, launch):
    judge(launch, Inputs(shape, micro, copies, order=order, norm=norm, seed=seed))
