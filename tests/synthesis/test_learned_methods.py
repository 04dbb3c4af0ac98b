"""Methods that learn a generator or a bank from group to group: fast, cmi, generative."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from dfkd.config import GenerateCommand, GenerateConfig
from dfkd.data import open_folder
from dfkd.errors import SettingError, UsageError
from dfkd.synthesis.bn_statistics import Moments
from dfkd.synthesis.finite import NotFinite
from dfkd.synthesis.losses import Seen
from dfkd.synthesis.methods import make_method, unread
from dfkd.synthesis.methods.cmi import Contrast, Projection
from dfkd.synthesis.methods.fast import RunningBatchNorm
from dfkd.synthesis.methods.generative import Balance, Disagreement, OneHot
from dfkd.synthesis.methods.generator import Generator, draw_weights
from dfkd.synthesis.methods.groups import POINTS, LossCurve
from dfkd.synthesis.run import open_run
from tests.synthesis.small_networks import bn_inputs, classifier

GROUP = 6
SMALL = "latent=5, width=4"
FAST, CMI = f"fast(steps=3, lr=0.01, {SMALL})", f"cmi(steps=3, lr=0.01, head=4, {SMALL})"
GENERATIVE = f"generative(steps=2, warmup=3, lr=0.01, {SMALL})"
METHODS = (FAST, CMI, GENERATIVE)


@pytest.fixture(scope="module")
def teacher():
    return classifier()


def method(teacher, text, student=None, **settings):
    config = GenerateConfig.of(method=text, **{"group": GROUP, "device": "cpu", **settings})
    return make_method(config, None, teacher, student)


def with_(text, **settings):
    return text[:-1] + "".join(f", {name}={value}" for name, value in settings.items()) + ")"


@pytest.mark.parametrize("text", METHODS)
def test_images_follow_from_seed_group_and_state(teacher, text):
    whole, again = method(teacher, text), method(teacher, text)
    first, second = whole(range(GROUP), seed=5), whole(range(GROUP, 2 * GROUP), seed=5)
    assert first.images.shape == (GROUP, 3, 8, 8) and first.images.dtype == torch.uint8
    both = again(range(2 * GROUP), seed=5)
    assert torch.equal(both.images, torch.cat([first.images, second.images]))
    assert both.records == first.records + second.records
    assert not torch.equal(method(teacher, text)(range(GROUP), seed=6).images, first.images)


@pytest.mark.parametrize("text", [*METHODS, "deepinversion(steps=2)"])
def test_images_are_the_same_where_gradients_are_off(teacher, text):
    wanted = method(teacher, text)(range(GROUP), seed=5)
    with torch.no_grad():
        assert torch.equal(method(teacher, text)(range(GROUP), seed=5).images, wanted.images)


@pytest.mark.parametrize("text", METHODS)
def test_the_state_is_taken_up_bit_for_bit(teacher, text):
    made = method(teacher, text)
    assert made.state_dict() == {}
    made(range(GROUP), seed=5)
    state = copy.deepcopy(made.state_dict())
    wanted = made(range(GROUP, 2 * GROUP), seed=5)
    other = method(teacher, text)
    other.load_state_dict(state)
    got = other(range(GROUP, 2 * GROUP), seed=5)
    assert torch.equal(got.images, wanted.images) and got.records == wanted.records
    after, expected = other.state_dict(), made.state_dict()
    assert after.keys() == expected.keys() and all(torch.equal(after[name], expected[name]) for name in after)
    fresh = method(teacher, text)(range(GROUP, 2 * GROUP), seed=5)
    assert not torch.equal(fresh.images, wanted.images) or fresh.records != wanted.records  # the state matters
    other.load_state_dict({})
    assert torch.equal(other(range(GROUP), seed=5).images, method(teacher, text)(range(GROUP), seed=5).images)


@pytest.mark.parametrize("text", METHODS)
def test_a_stopped_folder_is_finished_with_the_bytes_of_an_unbroken_run(teacher, text, tmp_path):
    config = GenerateConfig.of(method=text, group=GROUP, device="cpu", shard_size=GROUP)
    for name, parts in (("whole", [range(18)]), ("stopped", [range(6), range(6, 18)])):
        for part in parts:
            with open_run(make_method(config, None, teacher), tmp_path / name, 18, 5, config) as run:
                run.write(part=part)
    whole, stopped = (open_folder(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.digest == stopped.digest


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("batch", [4, 1])
def test_a_group_in_several_calls_is_the_same_but_for_rounding(teacher, text, batch):
    whole, cut = (method(teacher, text, batch=size)(range(GROUP), seed=5) for size in (64, batch))
    for name, value in whole.records[0].losses.items():
        assert cut.records[0].losses[name] == pytest.approx(value, rel=2e-3, abs=1e-4)  # Adam magnifies rounding
    assert ((whole.images.int() - cut.images.int()).abs() > 2).float().mean() < 0.02


@pytest.mark.parametrize("text", METHODS)
def test_triton_sees_the_same_losses(teacher, text):
    """BatchNorm with its moments and the adversarial loss by kernels, over a group in several calls."""
    student = classifier(seed=3)
    text = with_(merged(text, "steps=1"), adv_weight=1, **({"warmup": 0} if text == FAST else {}))
    eager, fused = (
        method(teacher, text, student, kernels=kernels, batch=4)(range(GROUP), seed=5).records[0].loss_curve
        for kernels in ("torch", "triton")
    )
    assert eager.keys() == fused.keys() >= {"bn", "adv", "cls"}
    for name, values in eager.items():  # of the first step, before Adam magnifies rounding
        assert fused[name][0] == pytest.approx(values[0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "text, loss",
    [
        (with_(FAST, steps=60, bn_weight=0, view="none").replace("steps=3, ", ""), "cls"),
        (with_(FAST, steps=60, cls_weight=0, bn_momentum=0).replace("steps=3, ", ""), "bn"),
        (with_(CMI, steps=60, cr_weight=0, view="none").replace("steps=3, ", ""), "bn"),
        (with_(CMI, steps=60, cls_weight=0, bn_weight=0.001, cr_weight=1, view="none").replace("steps=3, ", ""), "cr"),
        (with_(GENERATIVE, warmup=150, entropy_weight=0, bn_weight=0).replace("warmup=3, ", ""), "cls"),
        (with_(GENERATIVE, warmup=150, act_weight=1, bn_weight=0).replace("warmup=3, ", ""), "act"),
    ],
)
def test_each_loss_falls(teacher, text, loss):
    record = method(teacher, text)(range(GROUP), seed=1).records[0]
    curve = record.loss_curve[loss]
    assert len(curve) == POINTS and min(curve[-5:]) < curve[0] - 0.05 * abs(curve[0])


def test_balance_keeps_one_class_from_taking_over(teacher):
    of = [with_(GENERATIVE, warmup=150, bn_weight=0, entropy_weight=w).replace("warmup=3, ", "") for w in (0.001, 20)]
    taken, kept = (method(teacher, text)(range(GROUP), seed=1).records[0].losses["entropy"] for text in of)
    assert kept < taken - 0.1


CHANGES = {
    FAST: ["lr=0.02", "lr_z=0.5", "meta=reptile", "cls_weight=3", "bn_weight=1", "bn_momentum=0.1", "view=affine",
           "latent=6", "width=5", "steps=2", "reset=1, warmup=0"],
    CMI: ["lr=0.02", "cls_weight=3", "bn_weight=0.1", "cr_weight=9", "temperature=0.02", "bank=0", "head=3",
          "view=affine", "local_view=none", "latent=6", "width=5", "steps=2"],
    GENERATIVE: ["lr=0.02", "cls_weight=9", "bn_weight=9", "entropy_weight=0", "act_weight=9", "view=affine",
                 "latent=6", "width=5", "steps=9", "warmup=9"],
}  # fmt: skip


@pytest.mark.parametrize("text, change", [(text, change) for text, changes in CHANGES.items() for change in changes])
def test_every_setting_acts(teacher, text, change):
    plain, other = method(teacher, text), method(teacher, merged(text, change))
    changed = {name for name, value in other.identity().items() if plain.identity()[name] != value}
    assert changed == {part.split("=")[0] for part in change.split(", ")}
    before, after = (made(range(2 * GROUP), seed=5).images for made in (plain, other))
    assert not torch.equal(before, after)


def merged(text, change):
    name, _, inner = text[:-1].partition("(")
    settings = dict(part.split("=") for part in f"{inner}, {change}".split(", "))
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


@pytest.mark.parametrize("text", ["deepinversion(steps=3)", with_(FAST, warmup=0), CMI, GENERATIVE])
def test_a_student_changes_the_images_once_it_is_there(teacher, text):
    alone, rounds = method(teacher, with_(text, adv_weight=5)), method(teacher, with_(text, adv_weight=5))
    assert alone.describe() and "no student yet" in alone.describe()[0]
    known = method(teacher, with_(text, adv_weight=5), classifier(seed=3))
    assert known.describe() == [] and "student_digest" in known.identity()
    without, against = (made(range(GROUP), seed=5) for made in (alone, known))
    assert "adv" in against.records[0].losses and "adv" not in without.records[0].losses
    rounds.update(classifier(seed=3))
    assert torch.equal(rounds(range(GROUP), seed=5).images, against.images)
    assert not torch.equal(without.images, against.images)
    rounds.update(None)
    assert "adv" not in rounds(range(GROUP), seed=5).records[0].losses
    with pytest.raises(UsageError, match=r"its adv_weight is 0.*adv_weight=1"):
        method(teacher, with_(text, adv_weight=0), classifier(seed=3))
    with pytest.raises(UsageError, match="its adv_weight is 0"):
        method(teacher, with_(text, adv_weight=0)).update(classifier(seed=3))


def test_the_adversarial_loss_of_fast_waits_for_its_warmup(teacher):
    made = method(teacher, with_(FAST, warmup=1), classifier(seed=3))
    records = made(range(2 * GROUP), seed=5).records
    assert "adv" not in records[0].losses and "adv" in records[GROUP].losses


def test_the_bank_keeps_the_newest_images(teacher):
    made = method(teacher, with_(CMI, bank=8))
    made(range(GROUP), seed=5)
    first = made.bank.clone()
    made(range(GROUP, 2 * GROUP), seed=5)
    assert made.bank.shape == (8, 2 * made.channels) and torch.equal(made.bank[:2], first[-2:])


def test_generative_labels_are_the_teachers(teacher):
    made = method(teacher, GENERATIVE)(range(GROUP), seed=5)
    assert made.labels.tolist() == teacher.logits(made.images.float() / 255).argmax(1).tolist()
    chosen = method(teacher, GENERATIVE, only="two,zero")(range(GROUP), seed=5)
    logits = teacher.logits(chosen.images.float() / 255)
    assert chosen.labels.tolist() == [2 if row[2] > row[0] else 0 for row in logits.tolist()]
    with pytest.raises(UsageError, match="the class that the teacher sees"):
        method(teacher, GENERATIVE)([0], labels=[1])


@pytest.mark.parametrize("text", [FAST, CMI])
def test_labels_come_in_turn_and_may_be_given(teacher, text):
    assert method(teacher, text, only="two,zero")(range(4)).labels.tolist() == [2, 0, 2, 0]
    given = method(teacher, text)([4, 1], labels=[0, 2])
    assert given.labels.tolist() == [0, 2] and [record.id for record in given.records] == [4, 1]


@pytest.mark.parametrize("text", METHODS)
def test_progress_reaches_the_end_in_equal_parts(teacher, text):
    seen, made = [], method(teacher, text)
    made.on_progress = seen.append
    made(range(2 * GROUP))
    assert seen == pytest.approx([(i + 1) / len(seen) for i in range(len(seen))]) and seen[-1] == 1


@pytest.mark.parametrize("text", METHODS)
def test_images_that_are_not_finite_are_named(teacher, text):
    with pytest.raises(NotFinite, match=r"the images \[0, 1, .*lower lr"):
        method(teacher, with_(text, lr=1e30).replace("lr=0.01, ", ""))(range(GROUP))


def test_teachers_without_batch_norm(teacher):
    plain = classifier(norm=False)
    for text in METHODS:
        with pytest.raises(UsageError, match=r"no BatchNorm layer.*bn_weight=0"):
            method(plain, text)
    for text in (with_(FAST, bn_weight=0), with_(CMI, bn_weight=0, cr_weight=0), with_(GENERATIVE, bn_weight=0)):
        assert "bn" not in method(plain, text)(range(GROUP)).records[0].losses
    with pytest.raises(UsageError, match="its contrast is of"):
        method(plain, with_(CMI, bn_weight=0))


@pytest.mark.parametrize("size", [8, 14, 33])
def test_images_have_the_size_that_is_asked_for(teacher, size):
    assert method(teacher, FAST, size=size)(range(GROUP)).images.shape == (GROUP, 3, size, size)


@pytest.mark.parametrize("size, start, doublings", [(28, 7, 2), (32, 8, 2), (64, 8, 3), (224, 7, 5), (8, 2, 2)])
def test_the_generator_begins_with_a_small_map(size, start, doublings):
    made = Generator(3, 2, size)
    assert made.start == start and sum(type(layer).__name__ == "Upsample" for layer in made.body) == doublings
    images = made(torch.randn(2, 3))
    assert images.shape == (2, 3, size, size) and images.min() >= 0 and images.max() <= 1


def test_weights_follow_from_seed_purpose_and_index():
    nets = [Generator(3, 2, 8) for _ in range(3)]
    for net, index in zip(nets, (0, 0, 1), strict=True):
        draw_weights(net, 7, "test", index)
    first, same, other = (net.first.weight for net in nets)
    assert torch.equal(first, same) and not torch.equal(first, other) and abs(first.detach().std() - 0.02) < 0.01


def test_running_statistics_mix_means_and_variances(teacher):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, inputs = bn_inputs(teacher, images)
    layers = teacher.batch_norms()
    by_layer = {id(layer): x for x, layer in inputs}
    before = [(torch.full((layer.num_features,), 0.3), torch.full((layer.num_features,), 0.7)) for layer in layers]
    moments, wanted = [], torch.zeros(())
    for layer, (mean, variance) in zip(layers, before, strict=True):
        x = by_layer[id(layer)]
        centred = x - layer.running_mean[:, None, None]
        moments.append(Moments(centred.mean((2, 3)), centred.square().mean((2, 3))))
        own_mean, own_variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        mixed_mean = 0.1 * own_mean + 0.9 * (mean + layer.running_mean)
        mixed_variance = 0.1 * own_variance + 0.9 * variance
        wanted = wanted + torch.linalg.vector_norm(mixed_mean - layer.running_mean)
        wanted = wanted + torch.linalg.vector_norm(mixed_variance - layer.running_var)
    seen = Seen(images, logits, torch.zeros(5, dtype=torch.long), moments, layers)
    torch.testing.assert_close(RunningBatchNorm(1.0, 0.9, before)(seen), wanted.expand(5))


def test_contrast_is_its_formula():
    draw = torch.Generator().manual_seed(1)
    wide, local, bank = (torch.randn(n, 4, generator=draw) for n in (3, 3, 5))
    banked_wide = torch.randn(5, 4, generator=draw)
    head = Projection(4, 2)
    ours = torch.cat([head(local), head(bank)])
    theirs = torch.cat([head(wide), head(banked_wide)])
    rows = -(ours @ theirs.T / 0.5).log_softmax(1).diagonal()
    seen = Seen(wide, wide, torch.zeros(3), [Moments(wide, wide)])
    loss = Contrast(1.0, head, torch.cat((bank, banked_wide), 1), 0.5, local)
    torch.testing.assert_close(loss(seen).mean(), rows[:3].mean() + rows[3:].mean())


def test_losses_of_the_generative_method():
    logits = torch.tensor([[2.0, 0.0, 5.0], [0.0, 1.0, -3.0]], requires_grad=True)
    student = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    seen = Seen(logits, logits, torch.zeros(2), student_logits=student)
    torch.testing.assert_close(
        OneHot(1.0, (0, 1))(seen), F.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    )
    share = logits[:, :2].softmax(1).mean(0)
    torch.testing.assert_close(Balance(1.0, (0, 1))(seen), (share * share.log()).sum().expand(2))
    p = logits.softmax(1)
    torch.testing.assert_close(Disagreement(1.0)(seen), -(p * (p.log() - student.log_softmax(1))).sum(1))


@pytest.mark.parametrize("steps, shown", [(1, [0]), (2, [0, 1]), (20, list(range(20))), (1000, None)])
def test_curves_have_twenty_points_at_most(steps, shown):
    curve = LossCurve(steps)
    for step in range(steps):
        curve.see(step, {"cls": torch.tensor([float(step)])})
    points = curve.stacked()["cls"][0].tolist()
    assert len(points) == min(steps, POINTS) and (points[0], points[-1]) == (0, steps - 1)
    assert shown is None or points == shown


@pytest.mark.parametrize(
    "text, words",
    [
        ("fast(steps=0)", "steps is 0: it must be at least 1"),
        ("fast(meta=maml)", "it must be one of fomaml, reptile"),
        ("fast(view=mirror)", "it must be one of none, flip"),
        ("fast(bn_momentum=1)", "it must be at most 0.999"),
        ("cmi(negatives=3)", "it has no setting 'negatives'; it has lr"),
        ("cmi(temperature=0)", "temperature is 0: it must be at least 0.001"),
        ("generative(cls_weight=0, bn_weight=0)", "the teacher says nothing"),
        ("deepinversion(schedule=linear)", "it must be one of constant, cosine"),
    ],
)
def test_settings_that_are_refused(teacher, text, words):
    with pytest.raises((UsageError, SettingError), match=words):
        method(teacher, text)


def test_options_of_other_methods_are_named_as_idle(teacher):
    config = GenerateConfig.of(method=FAST, adv_weight=1.0, steps=3, group=GROUP, device="cpu")
    assert set(unread(make_method(config, None, teacher), config)) == {"adv_weight", "steps"}


def test_a_student_goes_with_the_methods_that_have_a_use_for_it(tmp_path):
    def asked(**settings):
        return GenerateCommand.of(out=tmp_path, student_checkpoint=tmp_path, **settings)

    for name in ("fast(steps=2)", "cmi", "generative", "deepinversion(adv_weight=1)", "my.py:Mine", "guided"):
        asked(method=name, **({"adv_weight": 1.0} if name == "guided" else {}))
    for name in ("guided", "noise", "folder(path=x)"):
        with pytest.raises(SettingError, match="acts only with"):
            asked(method=name)


@pytest.mark.parametrize("text", [FAST, CMI])
def test_a_student_that_chooses_candidates_is_that_of_the_adversarial_loss_too(teacher, text):
    choice, student = {"candidates": 2, "keep": "learnable"}, classifier(3)
    made = method(teacher, text, student, **choice)
    assert made.inner.student.digest() == student.digest()
    assert method(teacher, with_(text, adv_weight=0), student, **choice).inner.student is None
    with pytest.raises(UsageError, match="its adv_weight is 0"):
        method(teacher, with_(text, adv_weight=0), student)


def test_a_student_that_comes_later_chooses_candidates_of_a_method_without_that_loss(teacher):
    made = method(teacher, "deepinversion(steps=1)", classifier(3), candidates=2, keep="learnable")
    made.update(None)
    made.update(classifier(3))
    assert made.made == 2 and made.inner.student is None


def test_generative_has_no_candidates(teacher):
    with pytest.raises(UsageError, match=r"--candidates 3 with --method generative: .* leave it out"):
        method(teacher, GENERATIVE, candidates=3)


def test_the_records_of_a_folder_have_curves(teacher, tmp_path):
    config = GenerateConfig.of(method=CMI, group=GROUP, device="cpu")
    with open_run(make_method(config, None, teacher), tmp_path, GROUP, 0, config) as run:
        run.write()
    record = next(iter(open_folder(tmp_path).records()))
    assert {name: len(curve) for name, curve in record.loss_curve.items()} == {"cls": 3, "bn": 3, "cr": 3}
    assert json.dumps(record.loss_curve)
