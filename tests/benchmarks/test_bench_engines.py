"""The engines benchmark on networks of milliseconds: what is made, counted and judged of a function."""

import pytest
import torch

from benchmarks.bench_engines import Part, _rows, contiguous, groups
from benchmarks.recording import names_of
from dfkd.errors import UsageError
from dfkd_engine.backends import BACKENDS
from tests.synthesis.small_networks import pipeline


@pytest.fixture
def part(tmp_path):
    return lambda name, **settings: Part(pipeline(refine_steps=1, **settings), name, 4, tmp_path)


def test_every_way_computes_the_same_or_says_why_not(part, monkeypatch):
    monkeypatch.setattr(BACKENDS["inductor"], "unusable", lambda *_: "no compiler", raising=False)
    own = part("decode")
    made = {way: own.work(way, 2) for way in ("eager", "channels_last", "onnxruntime")}
    want = made["eager"].call()[0]
    for work in made.values():
        torch.testing.assert_close(work.call()[0], want)
        assert (work.amount, work.flop) == (2, made["eager"].flop) and 0 < work.facts["error"] < 1e-5
    assert made["onnxruntime"].facts["compile s"] > 0 and "compile s" not in made["eager"].facts
    assert own.way("onnxruntime") is own.way("onnxruntime"), "it is compiled once for all sizes"
    with pytest.raises(UsageError, match="no compiler"):
        own.work("inductor", 2)


def test_a_gradient_counts_its_backward_pass_and_its_error(part):
    decode, gradient = part("decode").work("channels_last", 2), part("gradient").work("channels_last", 2)
    assert gradient.flop > 2 * decode.flop and part("gradient").work("channels_last", 4).flop == 2 * gradient.flop
    assert gradient.facts["error"] < 1e-4


def test_a_function_that_the_settings_lack_is_an_error_of_its_rows(tmp_path):
    (group,) = groups(pipeline(), [2], tmp_path, ["pixel_gradient"], ["eager"])  # these settings refine no pixels
    with pytest.raises(LookupError, match="no pixel_gradient, but unet, decode, gradient"):
        group.rows["eager"]()


def test_eager_has_copies_of_the_networks_in_the_order_of_nchw():
    pipe = pipeline()
    for network in (pipe.prior.denoiser, pipe.prior.vae):
        network.to(memory_format=torch.channels_last)
    own, z = contiguous(pipe), torch.randn(2, 2, 4, 4)
    for made, as_it_was in ((own, True), (pipe, False)):
        assert all(weight.is_contiguous() for weight in made.prior.vae.parameters()) is as_it_was
    ours, theirs = (p.functions()[1].call(z)[0] for p in (pipe, own))
    torch.testing.assert_close(ours, theirs)
    assert next(own.guidance.teacher.parameters()) is next(own.teacher.parameters())


def test_wrong_words_are_refused():
    with pytest.raises(Exception, match="unknown 'tensorflow'; known are eager, inductor"):
        names_of(["eager", "inductor"])("eager,tensorflow")
    with pytest.raises(Exception, match="2 rows or more"):
        _rows("1,25")
