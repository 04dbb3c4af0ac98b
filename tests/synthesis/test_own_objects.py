"""A guidance loss and a linear sampler of the user's own, each in one file: they act, and change identity and keys."""

import pytest
import torch

from dfkd.compiled.engines import engine_spec
from dfkd.errors import UsageError
from dfkd.synthesis.losses import GuidanceLoss
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.run import generate
from dfkd.synthesis.schedule import build_table
from dfkd.teachers.committee import Committee
from tests.synthesis.small_networks import SCHEDULER, SmallPrior, classifier, pipeline

LOSS = """
from dataclasses import dataclass
from dfkd.synthesis.losses import GuidanceLoss
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.run import generate

@dataclass(frozen=True)
class Entropy(GuidanceLoss):
    sharp: float = 1.0

    def __call__(self, seen):
        logits = self.sharp * seen.logits
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)

class Broken(GuidanceLoss):
    def __call__(self, seen):
        return seen.images.mean(9)

class Scalar(GuidanceLoss):
    def __call__(self, seen):
        return seen.images.mean()
"""
SAMPLER = """
import torch
from dfkd.synthesis.schedule import Sampler, Update

def stochastic(eta=1.0):
    '''DDIM with noise, arXiv:2010.02502 eq. 12 and 16.'''
    def update(levels, config):
        alpha = levels.alpha / levels.next_alpha
        std = eta * levels.next_sigma / levels.sigma * (1 - alpha ** 2).sqrt()
        ratio = (levels.next_sigma ** 2 - std ** 2).sqrt() / levels.sigma
        return Update(z=ratio, z0=levels.next_alpha - ratio * levels.alpha, prev=torch.zeros_like(std), noise=std)
    return Sampler("DDIMScheduler", update)

wrong = 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in (("losses", LOSS), ("samplers", SAMPLER)):
        (folder / f"{name}.py").write_text(text)
    return folder


def key(pipe, name="gradient"):
    return engine_spec(next(f for f in pipe.functions() if f.name == name), "inductor", "cpu test").key()


def entropy_of(pipe):
    images = pipe(range(7), seed=3).images
    with torch.no_grad():
        p = pipe.teacher(images).softmax(1)
    return -(p * p.log()).sum(1).mean()


def test_a_loss_in_a_file(files):
    plain = pipeline(bn_weight=0.0, cls_weight=0.1)
    own = pipeline(bn_weight=0.0, cls_weight=0.1, loss=(f"{files}/losses.py:Entropy(weight=5.0)",))
    assert entropy_of(own) < entropy_of(plain)
    assert list(own([0], seed=3).records[0].losses) == ["cls", "entropy"]
    sharper = pipeline(bn_weight=0.0, cls_weight=0.1, loss=(f"{files}/losses.py:Entropy(weight=5.0, sharp=2.0)",))
    for pipes in ((plain, own), (own, sharper)):
        first, second = pipes
        assert first.identity() != second.identity() and key(first) != key(second)
    assert own.identity()["losses"][1]["fields"] == {"weight": 5.0, "sharp": 1.0}


def test_a_loss_as_an_object_is_one_in_a_file(files):
    named = pipeline(loss=(f"{files}/losses.py:Entropy(weight=2.0)",))
    given = pipeline(losses=[named.losses[-1]])
    assert isinstance(named.losses[-1], GuidanceLoss) and given.identity() == named.identity()
    assert torch.equal(given(range(7), seed=3).images, named(range(7), seed=3).images)
    alone = pipeline(bn_weight=0.0, cls_weight=0.0, losses=[named.losses[-1]])
    assert list(alone([0], seed=3).records[0].losses) == ["entropy"]


def test_a_loss_that_is_no_number_an_image_is_refused(files):
    with pytest.raises(UsageError, match=r"the guidance loss scalar has the shape \[\] for two images"):
        pipeline(loss=(f"{files}/losses.py:Scalar(weight=1.0)",))
    with pytest.raises(UsageError, match="the guidance loss broken fails: IndexError: Dimension out of range"):
        pipeline(loss=(f"{files}/losses.py:Broken(weight=1.0)",))
    with pytest.raises(UsageError, match=r"unknown guidance loss 'Entropy': wanted is FILE\.py:NAME"):
        pipeline(loss=("Entropy",))
    with pytest.raises(UsageError, match="unexpected keyword argument 'blunt'"):
        pipeline(loss=(f"{files}/losses.py:Entropy(weight=1.0, blunt=1)",))


def test_a_sampler_in_a_file(files):
    own = f"{files}/samplers.py:stochastic"
    ddim, ddpm = (build_table(SCHEDULER, name, 10) for name in ("ddim", "ddpm"))
    still, noisy = (build_table(SCHEDULER, f"{own}(eta={eta})", 10) for eta in (0.0, 1.0))
    torch.testing.assert_close(still.step_z, ddim.step_z, rtol=1e-12, atol=1e-12)
    assert (noisy.step_noise[:-1] > 0.5 * ddpm.step_noise[:-1]).all()  # near the posterior's own
    pipes = [pipeline(sampler=name) for name in ("ddim", f"{own}(eta=0.0)", f"{own}(eta=1.0)")]
    identities = [pipe.identity() for pipe in pipes]
    assert identities[0] != identities[1] != identities[2]
    first, second, third = (pipe(range(7), seed=3).images for pipe in pipes)
    assert (first.int() - second.int()).abs().max() <= 1 and not torch.equal(second, third)
    assert len({key(pipe, "unet") for pipe in pipes}) == 1  # a UNet does not follow from its sampler


@pytest.mark.parametrize("name", ["wrong", "absent", "stochastic(theta=1)"])
def test_what_is_no_sampler_is_refused(files, name):
    with pytest.raises(UsageError):
        build_table(SCHEDULER, f"{files}/samplers.py:{name}", 10)


def test_what_a_pipeline_alone_does_not_go_by_is_refused(tmp_path):
    """What is around a pipeline, or comes before its first image, is not left out in silence."""
    for settings, flag in (
        ({"candidates": 3}, "--candidates"),
        ({"filter_views": 2}, "--filter-views"),
        ({"keep_intermediates": 1}, "--keep-intermediates"),
    ):
        with pytest.raises(UsageError, match=f"{flag} cannot act"):
            generate(pipeline(**settings), tmp_path / "images", count=7)
        made = make_method(pipeline(**settings).config, SmallPrior(), classifier())
        assert len(generate(made, tmp_path / flag, count=14).labels)
    with pytest.raises(UsageError, match="--step-trials cannot act yet"):
        pipeline(step_trials=3)(range(7))
    with pytest.raises(UsageError, match="--teaching each in one pipeline"):
        pipeline(teacher=Committee.of([classifier()]), teaching="each")
