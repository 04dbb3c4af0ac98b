"""A teacher that guides in bfloat16: convolutions in bfloat16, weights and logits in float32, and who goes by it."""

import pytest
import torch
from torch import nn

from dfkd.synthesis.guidance import Guidance, identity
from dfkd.synthesis.losses import BatchNormLoss, CrossEntropy
from dfkd.synthesis.methods import make_method
from dfkd.synthesis.teacher_precision import narrowed
from dfkd.teachers.committee import Committee
from tests.synthesis.small_networks import CLASS_NAMES, classifier, pipeline

SIDE = 16
LABELS = torch.arange(6) % len(CLASS_NAMES)


def images():
    return torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def seen_dtypes(teacher):
    """dtypes of what the convolutions of a teacher's network give, in a call."""
    found = set()
    for module in teacher.module.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: found.add(o.dtype))
    logits = teacher.logits(images())
    return found, logits.dtype


def test_convolutions_are_in_bfloat16_and_weights_stay():
    own = classifier(size=SIDE).freeze()
    bf16 = narrowed(own, "bf16")
    assert seen_dtypes(bf16) == ({torch.bfloat16}, torch.float32)
    assert {weight.dtype for weight in bf16.parameters()} == {torch.float32}
    assert narrowed(own, "fp32") is own
    several = narrowed(Committee.of([own, classifier(size=SIDE)]), "bf16")
    assert all(type(member.classifier.module).__name__ == "InBfloat16" for member in several.members)


def test_the_gradient_is_that_of_float32_to_bfloat16s_digits():
    own, losses = classifier(size=SIDE).freeze(), (CrossEntropy(1.0), BatchNormLoss(10.0, "group", "relative"))
    found, wanted = (
        Guidance(identity, narrowed(own, dtype), losses).gradient(images(), LABELS, 6)[0] for dtype in ("bf16", "fp32")
    )
    assert not torch.equal(found, wanted) and found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(1), wanted.flatten(1)).min() > 0.99


@pytest.mark.parametrize("method", ["guided", "deepinversion(steps=2)"])
def test_images_follow_from_it_and_it_is_of_the_identity(method):
    pipe = pipeline(refine_steps=1)
    config = pipe.config.replace(method=method)
    made = [make_method(config.replace(teacher_dtype=dtype), pipe.prior, pipe.teacher) for dtype in ("fp32", "bf16")]
    one, other = (method(range(config.batching.group)) for method in made)
    assert not torch.equal(one.images, other.images)
    assert made[0].identity() != made[1].identity()


def test_its_gradient_is_no_engine():
    plain, narrow = (pipeline(teacher_dtype=dtype) for dtype in ("fp32", "bf16"))
    assert "gradient" in [function.name for function in plain.functions()]
    assert [function.name for function in narrow.functions()] == ["unet", "decode", "decode_vjp"]
