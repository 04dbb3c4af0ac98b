"""GuidedPipeline: which images come for which ids, how they are cut and packed into calls, and what is refused."""

import json

import pytest
import torch
from torch import nn

from dfkd.errors import UsageError
from dfkd.synthesis.batching import ShortMemory
from dfkd.synthesis.finite import NotFinite
from dfkd.synthesis.run import generate
from dfkd.synthesis.synthesizer import Synthesizer
from tests.synthesis.small_networks import CLASS_NAMES, SmallPrior, classifier, doubled, pipeline

SEED = 11
EVERYTHING = {"cutmix_every": 2, "noise_edit_steps": 2, "noise_edit_scale": 0.01, "guidance_step": 0.1}
EVERYTHING |= {"sampler": "ddpm", "refine_steps": 2, "refine_step": 0.01}
ALONE = {"bn_stats": "image", "guidance_step": 0.1}  # images do not interact


def close(images, others):
    """uint8 images that differ by rounding: of float32 kernels by shape, enlarged by guided steps."""
    return (images.int() - others.int()).abs().max() <= 1


def test_images_labels_and_records():
    pipe = pipeline(**EVERYTHING)
    assert isinstance(pipe, Synthesizer) and (pipe.image_size, pipe.group, pipe.call_size) == (8, 7, 7)
    sample = pipe(range(7), seed=SEED)
    assert sample.images.shape == (7, 3, 8, 8) and sample.images.dtype == torch.uint8
    assert sample.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    record = sample.records[3]
    assert (record.id, record.label, record.class_name, record.seed, record.prompt) == (3, 0, "zero", SEED, "a zero")
    assert record.partner in (0, 6) and len(record.box) == 4  # of the same class
    assert list(record.losses) == list(record.loss_curve) == ["cls", "bn"]
    assert len(record.loss_curve["cls"]) == 4 and record.losses["cls"] == record.loss_curve["cls"][-1]
    with torch.no_grad():
        sure = pipe.teacher(sample.images).softmax(1).gather(1, sample.labels[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([r.teacher_probability for r in sample.records]), sure, rtol=1e-4, atol=0)
    assert torch.equal(pipe(range(7), seed=SEED).images, sample.images)
    assert not torch.equal(pipe(range(7), seed=SEED + 1).images, sample.images)


def test_the_prompt_is_the_priors_unless_one_is_given():
    assert pipeline(prompt=None)(range(7)).records[1].prompt == "a drawing of one"
    prompts = [pipeline(prompt=prompt).identity()["prompt"] for prompt in (None, "a drawing of {label}", "")]
    assert prompts == ["a drawing of {label}", "a drawing of {label}", ""]


def test_classes_that_the_prior_has_no_words_for_are_named():
    prior = SmallPrior()
    prior.labels = ("zero", "one")
    with pytest.warns(UserWarning, match=f"the prior does not know {CLASS_NAMES[2]}, "):
        pipeline(prior)


def test_cutmix_has_a_partner_for_every_image_of_a_small_group():
    sample = pipeline(cutmix_every=2, group=4, batch=4, **ALONE)(range(8), seed=SEED)
    assert sample.labels.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert [record.partner for record in sample.records] == [1, 0, 3, 2, 5, 4, 7, 6]


def test_a_part_of_a_group_is_that_of_the_whole():
    """In the order asked, over several groups, whose calls are packed."""
    pipe = pipeline(**EVERYTHING, batch=14)
    whole = pipe(range(21), seed=SEED)
    some = pipe([16, 3, 20], seed=SEED)
    assert [record.id for record in some.records] == [16, 3, 20]
    assert close(some.images, whole.images[[16, 3, 20]])
    assert some.labels.tolist() == whole.labels[[16, 3, 20]].tolist()


@pytest.mark.parametrize("path", ["latent", "unet"])
@pytest.mark.parametrize("stats", ["image", "group"])
def test_images_do_not_depend_on_the_call_size(monkeypatch, path, stats):
    """A group in several calls, one in one, several in one: float64, so that rounding stays out of sight."""
    pipe = doubled(pipeline(**EVERYTHING, gradient=path, bn_stats=stats), monkeypatch)
    latents = {}
    for batch in (1, 3, 7, 100):
        pipe.call_size = batch
        latents[batch] = pipe.latents(pipe.pack(torch.arange(14), SEED))
    for batch in (1, 3, 7):
        torch.testing.assert_close(latents[batch], latents[100], rtol=1e-7, atol=1e-7)


def test_an_image_without_interaction_is_made_alone():
    prior = SmallPrior()
    pipe = pipeline(prior, **ALONE)
    assert pipe.group == 1
    whole = pipe(range(5), seed=SEED)
    prior.calls.clear()
    assert close(pipe([3], seed=SEED).images, whole.images[3:4])
    assert {rows for rows, _ in prior.calls} == {2}  # the image with and without its prompt


def test_calls_are_packed_with_whole_groups_or_cut():
    def rows(**own):
        prior = SmallPrior()
        pipeline(prior, cfg=1.0, steps=1, guidance_step=0.1, **own)(range(20), seed=SEED)
        return [count for count, _ in prior.calls]

    assert rows(group=5, batch=10) == [10, 10]
    assert rows(group=5, batch=12) == [10, 10]  # whole groups
    assert rows(group=10, batch=4) == [4, 4, 2] * 2
    assert rows(group=5, batch=8, bn_stats="image") == [8, 8, 4]  # a group is only who interacts


def test_labels_may_be_given():
    pipe = pipeline(**ALONE)
    own, given = pipe([4, 5], seed=SEED), pipe([4, 5], labels=[2, 2], seed=SEED)
    assert own.labels.tolist() == [1, 2] and given.labels.tolist() == [2, 2]
    assert given.records[0].prompt == "a two" and close(given.images[1], own.images[1])
    assert not torch.equal(given.images[0], own.images[0])
    one = pipeline(**ALONE, only="two")
    assert one(range(2), seed=SEED).labels.tolist() == [2, 2]


def test_a_callback_sees_and_replaces_tensors():
    pipe, seen = pipeline(**ALONE, batch=2), []

    def watch(pipe, step, timestep, tensors):
        assert tensors.keys() == {"latents", "clean"}
        seen.append((step, timestep, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    sample = pipe(range(3), seed=SEED, callback_on_step_end=watch)
    times = pipe.table.timesteps.tolist()
    assert seen == [(i, times[i], (rows, 2, 4, 4)) for rows in (2, 1) for i in range(4)]
    black = pipe.prior.decode(torch.zeros(1, 2, 4, 4))
    assert close(sample.images, (255 * black).round().to(torch.uint8).expand(3, -1, -1, -1))


@pytest.mark.parametrize("more, steps", [({}, 3), ({"noise_edit_steps": 2, "refine_steps": 4}, 9)])
def test_a_call_tells_the_share_of_its_steps(more, steps):
    pipe, seen = pipeline(group=2, batch=2, steps=3, **more), []
    pipe.on_progress = seen.append
    pipe(range(4))  # two packs
    assert seen == pytest.approx([(i + 1) / (2 * steps) for i in range(2 * steps)])


def test_identity_names_all_that_images_follow_from():
    base = pipeline().identity()
    assert json.loads(json.dumps(base)) == base and base["size"] == 8 and base["group"] == 7
    for changed in (
        pipeline(SmallPrior(seed=2)), pipeline(teacher=classifier(seed=2)), pipeline(cfg=2.0), pipeline(group=5),
        pipeline(bn_weight=0.2), pipeline(bn_loss="relative"), pipeline(sampler="euler"),
    ):  # fmt: skip
        assert changed.identity() != base
    assert pipeline(batch=3, device="cpu", kernels="auto").identity() == base  # decide rounding alone
    assert pipeline(**ALONE, group=5).identity() == pipeline(**ALONE).identity()


def test_adversarial_guidance_takes_a_newer_student():
    def student_of(sure):
        """Names the teacher's class, less surely."""
        student = classifier()
        for parameter in student.module[-1].parameters():
            parameter.mul_(sure)
        return student

    student = student_of(0.5)
    student.module.train().requires_grad_(True)
    pipe = pipeline(student=student, adv_weight=1.0, **ALONE)
    assert student.module.training and next(student.parameters()).requires_grad  # its own copy is frozen
    first, identity = pipe(range(3), seed=SEED), pipe.identity()
    assert list(first.records[0].losses) == ["cls", "bn", "adv"]
    pipe.update(student_of(0.1))
    assert pipe.identity()["student_digest"] != identity["student_digest"]
    assert not torch.equal(pipe(range(3), seed=SEED).images, first.images)
    with pytest.raises(UsageError, match="the student has 2 classes that are not the teacher's"):
        pipe.update(classifier().replace(class_names=("a", "b")))


def test_without_a_student_yet_its_loss_rests():
    plain = pipeline(**ALONE)(range(3), seed=SEED)
    student = classifier()
    for parameter in student.module[-1].parameters():
        parameter.mul_(0.5)  # it names the teacher's class, less surely
    pipe = pipeline(student=student, adv_weight=1.0, **ALONE)
    against, names = pipe(range(3), seed=SEED), [one.name for one in pipe.functions()]
    pipe.update(None)
    resting = pipe(range(3), seed=SEED)
    assert torch.equal(resting.images, plain.images) and resting.records == plain.records
    assert pipe.identity()["student_digest"] is None and [one.name for one in pipe.functions()] == names
    pipe.update(student)
    assert torch.equal(pipe(range(3), seed=SEED).images, against.images)
    assert not torch.equal(against.images, plain.images)


def spoilt(call, after=0):
    """A function of images' tensors that gives NaN for the third from its call `after` on."""
    calls = []

    def spoiling(z, *more):
        calls.append(z)
        place = torch.arange(len(z))[:, None, None, None] % 4 == 2
        return call(z, *more) * torch.where(place & (len(calls) > after), torch.nan, 1.0)

    return spoiling


LOWER, BF16 = "lower --guidance-step", "float16 ends at 65 504: use --dtype bf16"


@pytest.mark.parametrize(
    "own, part, after, half, first, todo",
    [
        ({}, "decode", 0, (), "the guidance loss cls at step 1 of 3", "see to the losses"),
        ({}, "decode", 1, ("decode",), "the guidance loss cls at step 2 of 3", BF16),
        ({"guidance_step": 0.0}, "decode", 0, (), "the decoder's image at the end", "see to the prior"),
        ({"guidance_step": 0.0}, "decode", 0, ("decode",), "the decoder's image at the end", BF16),
        ({}, "denoise", 0, (), "the denoiser's prediction at step 1 of 3", "see to the prior"),
        ({}, "denoise", 1, (), "the denoiser's prediction at step 2 of 3", LOWER),
        ({}, "denoise", 2, ("unet", "decode"), "the denoiser's prediction at step 3 of 3", BF16),
        ({"gradient": "unet"}, "denoise", 2, (), "the denoiser's prediction at step 2 of 3", LOWER),
        (
            {"refine_steps": 2, "guide_from": 1.0},
            "judge",
            1,
            (),
            "the guidance loss cls at a refinement",
            "see to the los",
        ),
    ],
)
def test_images_that_are_not_finite_are_named_with_what_was_so_first(monkeypatch, own, part, after, half, first, todo):
    prior = SmallPrior()
    pipe = pipeline(prior, steps=3, **{**ALONE, "cfg": 1.0, **own})
    monkeypatch.setattr("dfkd.synthesis.pipeline.dtype_of", lambda name, _: "float16" if name in half else "float32")
    where = pipe.teacher if part == "judge" else prior
    name = "prepare" if part == "judge" else part
    object.__setattr__(where, name, spoilt(getattr(where, name), after))
    if pipe.guidance is not None and part == "decode":
        pipe.guidance.decode = prior.decode
    with pytest.raises(NotFinite) as caught:
        pipe([4, 5, 6, 7], seed=SEED)
    assert caught.value.what == "the images [6] are not finite" and isinstance(caught.value, FloatingPointError)
    assert caught.value.why == f"first is {first}" and caught.value.todo.startswith(todo)


def test_latents_that_a_guidance_step_threw_far_away_are_told_from_a_prediction_that_failed():
    pipe = pipeline(steps=3, **{**ALONE, "guidance_norm": "none", "guidance_step": 1e39})
    with pytest.raises(NotFinite, match=f"first is the latents, beyond 1000, at step 1 of 3. {LOWER}"):
        pipe([4, 5], seed=SEED)


def test_a_guidance_step_that_is_too_long_is_told_from_the_losses_behind_it(monkeypatch):
    """The second guidance step of a denoising step starts where the first has led; the decoder fails there alone."""
    monkeypatch.setattr("dfkd.synthesis.pipeline.dtype_of", lambda *_: "float16")
    prior = SmallPrior()
    decode = prior.decode
    prior.decode = lambda z0: decode(z0) * torch.where(z0.abs().amax((1, 2, 3), True) > 65504, torch.nan, 1.0)
    pipe = pipeline(prior, steps=3, **{**ALONE, "guidance_step": 1e6, "guidance_repeats": 2})
    with pytest.raises(NotFinite, match=f"first is the latents, beyond 1000, at step 1 of 3. {LOWER}"):
        pipe([4, 5], seed=SEED)


@pytest.mark.parametrize("network", ["unet", "decode", "gradient"])
@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("no room\nat all"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("no operator"), False),
    ],
)
def test_short_memory_names_the_call(network, error, told):
    prior, teacher = SmallPrior(), classifier()
    pipe = pipeline(prior, teacher, **ALONE)

    def fails(*_):
        raise error

    if network == "gradient":
        teacher.module.register_forward_pre_hook(fails)
    else:
        setattr(prior, {"unet": "denoise"}.get(network, network), fails)
    with pytest.raises(ShortMemory if told else RuntimeError) as caught:
        pipe([0], seed=SEED)
    if told:
        first = str(error).partition("\n")[0]
        assert caught.value.network == network
        assert str(caught.value) == f"out of memory in a call of {network}: {first}. lower --batch, or --size."


class TwoLogits(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[:, :2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "bf16"}, "the prior is in fp32, the settings say bf16"),
        ({"size": 9}, "--size 9 does not fit the prior"),
        ({"only": "three"}, "unknown class 'three'"),
        ({"prompt": "a {thing}"}, "cannot be filled in"),
        ({"sampler": "ddim", "steps": 1000}, "steps_offset"),
        ({"teacher": classifier(norm=False)}, "has no BatchNorm layer"),
        ({"teacher": classifier(norm=False), "bn_weight": 0, "noise_edit_steps": 1}, "has no BatchNorm layer"),
        ({"teacher": classifier().replace(class_names=("a", "b"))}, "gives 3 logits: there are 2 class names"),
        ({"adv_weight": 1.0}, "has no student"),
    ],
)
def test_refusals_before_any_work(change, message):
    prior = SmallPrior()
    with pytest.raises(UsageError, match=message):
        pipeline(prior, **change)
    assert not prior.calls


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "build it: dfkd-engines build --backend onnxruntime .*--batch 5"),
        ({"gradient": "unet"}, "cannot be used"),
    ],
)
def test_a_run_without_its_engines_is_refused_before_it_is_planned(tmp_path, change, message):
    prior = SmallPrior()
    pipe = pipeline(prior, engines=tmp_path, backend="onnxruntime", batch=5, **change)
    with pytest.raises(UsageError, match=message):
        pipe([0])
    with pytest.raises(UsageError, match=message):
        generate(pipe, tmp_path / "out", 7)
    assert not prior.calls


@pytest.mark.parametrize("ids, labels", [([], None), ([1, 1], None), ([-1], None), ([1], [3]), ([1, 2], [0])])
def test_wrong_ids_and_labels_are_refused(ids, labels):
    with pytest.raises(UsageError):
        pipeline(**ALONE)(ids, labels=labels)


def test_a_teacher_without_batch_norm_guides_by_class():
    pipe = pipeline(teacher=classifier(norm=False), bn_weight=0)
    assert pipe.group == 1 and list(pipe([0], seed=SEED).records[0].losses) == ["cls"]


def test_without_guidance_no_teacher_acts():
    free, other = (pipeline(teacher=classifier(seed=seed), guidance_step=0.0) for seed in (0, 1))
    assert torch.equal(free(range(3), seed=SEED).images, other(range(3), seed=SEED).images)
    record = free([0], seed=SEED).records[0]
    assert free.guidance is None and not record.losses and not record.loss_curve
    assert CLASS_NAMES[record.label] == "zero" and record.teacher_probability > 0
