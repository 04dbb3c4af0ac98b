"""Methods beside the guided pipeline: DeepInversion against its formula, noise, and one in a file of the user's own."""

import pytest
import torch
import torch.nn.functional as F

from dfkd.config import METHODS as NAMES
from dfkd.config import GenerateConfig
from dfkd.errors import UsageError
from dfkd.runtime import generator
from dfkd.synthesis.finite import NotFinite
from dfkd.synthesis.losses import Seen
from dfkd.synthesis.methods import METHODS, make_method, needs_prior, unread
from dfkd.synthesis.methods.deepinversion import Competition
from dfkd.synthesis.run import identity_of
from dfkd.synthesis.synthesizer import Synthesizer
from dfkd_engine.errors import EngineError
from dfkd_kernels.philox import philox_uniform
from tests.synthesis.small_networks import CLASS_NAMES, bn_inputs, classifier, plain_bn_loss

GROUP = 6


@pytest.fixture(scope="module")
def teacher():
    return classifier()


def method(teacher, text, **settings):
    return make_method(GenerateConfig.of(method=text, **{"group": GROUP, "device": "cpu", **settings}), None, teacher)


def probabilities(sample):
    return torch.tensor([record.teacher_probability for record in sample.records])


def test_noise_is_uniform_and_grey_in_half_of_the_images(teacher):
    noise = method(teacher, "noise")
    assert isinstance(noise, Synthesizer) and (noise.group, noise.image_size) == (1, 8)
    sample = noise(range(400), seed=3)
    assert sample.images.shape == (400, 3, 8, 8) and sample.images.dtype == torch.uint8
    pixels = sample.images.float() / 255
    assert abs(pixels.mean() - 1 / 2) < 0.01 and abs(pixels.var() - 1 / 12) < 0.01
    grey = (sample.images[:, :1] == sample.images).all(3).all(2).all(1)
    assert abs(grey.float().mean() - 0.5) < 0.1  # four standard deviations
    assert sample.labels.tolist() == [i % 3 for i in range(400)]
    shown = teacher.logits(pixels).softmax(1).gather(1, sample.labels[:, None])[:, 0]
    torch.testing.assert_close(probabilities(sample), shown, rtol=1e-4, atol=1e-5)  # five digits
    assert not torch.equal(method(teacher, "noise(grey=0)")(range(9), seed=3).images, sample.images[:9])


@pytest.mark.parametrize("text", ["noise", "deepinversion(steps=3)"])
def test_an_image_follows_from_seed_and_id(teacher, text):
    made = method(teacher, text, only="two,zero")
    whole = made(range(2 * GROUP), seed=5)
    some = made([7, 2, 9], seed=5)
    assert torch.equal(some.images, whole.images[[7, 2, 9]]) and torch.equal(some.labels, whole.labels[[7, 2, 9]])
    assert some.records == tuple(whole.records[i] for i in (7, 2, 9))
    assert whole.labels.tolist() == [2, 0] * GROUP and whole.records[1].class_name == "zero"
    assert not torch.equal(made([2], seed=6).images, some.images[1:2])
    given = made([7, 2], labels=[1, 1], seed=5)
    assert given.labels.tolist() == [1, 1] and [r.label for r in given.records] == [1, 1]


def deepinversion(teacher, seed, group, steps, lr, bn, tv, shift, flip):
    """The images of one group, written from the formula."""
    ids = torch.arange(group * GROUP, (group + 1) * GROUP)
    x = philox_uniform(seed, ids, 0, (3, 8, 8)).requires_grad_()
    views, adam = generator(seed, "deepinversion", group), torch.optim.Adam([x], lr=lr)
    for _ in range(steps):
        moved = x.roll(torch.randint(-shift, shift + 1, (2,), generator=views).tolist(), (2, 3))
        if torch.rand((), generator=views) < 0.5 and flip:
            moved = moved.flip(3)
        logits, inputs = bn_inputs(teacher, moved)
        variation = moved.diff(dim=2).abs().mean() + moved.diff(dim=3).abs().mean()
        loss = F.cross_entropy(logits, ids % 3) + bn * plain_bn_loss(inputs, "relative") + tv * variation
        adam.zero_grad()
        (GROUP * loss).backward()
        adam.step()
        x.data.clamp_(0, 1)
    return x.detach() * 255


@pytest.mark.parametrize("flip, weights", [(False, (10.0, 0.05)), (True, (10.0, 20.0)), (True, (0.0, 0.0))])
@pytest.mark.parametrize("batch", [64, 4])
def test_deepinversion_is_its_formula(teacher, flip, weights, batch):
    text = f"deepinversion(steps=4, lr=0.05, bn_weight={weights[0]}, tv_weight={weights[1]}, shift=1, flip={flip})"
    sample = method(teacher, text, batch=batch)(range(GROUP, 2 * GROUP), seed=9)
    wanted = deepinversion(teacher, 9, 1, 4, 0.05, *weights, 1, flip)
    off = (sample.images - wanted).abs()
    # Adam divides by the gradient's size: the few gradients near zero may go the other way
    assert off.median() <= 0.5 and (off > 1).float().mean() < 0.02


def test_deepinversion_makes_the_teacher_sure_and_meets_its_statistics(teacher):
    made = method(teacher, "deepinversion(steps=60, lr=0.05)")
    assert isinstance(made, Synthesizer) and made.group == GROUP
    before, after = (method(teacher, f"deepinversion(steps={n}, lr=0.05)")(range(GROUP)).records for n in (1, 60))
    assert after[0].losses.keys() == {"cls", "bn", "tv"} and after[0].losses["bn"] < before[0].losses["bn"] / 2
    sure = method(teacher, "deepinversion(steps=60, lr=0.05, bn_weight=0, tv_weight=0)")(range(GROUP))
    assert sure.records[0].losses.keys() == {"cls"}
    assert (probabilities(sure) > probabilities(method(teacher, "noise")(range(GROUP))) + 0.05).all()


@pytest.mark.parametrize("more", ["schedule=cosine", "l2_weight=2", "cls_weight=0", "shift=0", "flip=True"])
def test_each_setting_of_deepinversion_acts(teacher, more):
    plain, other = (method(teacher, f"deepinversion(steps=8, lr=0.05{text})") for text in ("", ", " + more))
    name = more.partition("=")[0]
    assert {key for key, value in other.identity().items() if plain.identity()[key] != value} == {name}
    assert not torch.equal(plain(range(GROUP)).images, other(range(GROUP)).images)


def test_a_cosine_schedule_comes_to_rest(teacher):
    text = "deepinversion(steps=40, lr=0.05, shift=0, schedule=cosine)"
    curve = method(teacher, text)(range(GROUP)).records[0].loss_curve["tv"]
    early, late = curve[:3], curve[-3:]
    assert len(curve) == 20 and max(late) - min(late) < 0.1 * (max(early) - min(early))


def test_competition_is_the_published_divergence():
    teacher, student = torch.tensor([[1.0, 0.0, -9.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    p, q = (torch.softmax(logits / 3, 1) for logits in (teacher, student))
    m, p, q = (x.clamp(0.01, 0.99) for x in ((p + q) / 2, p, q))
    wanted = (F.kl_div(p.log(), m, reduction="batchmean") + F.kl_div(q.log(), m, reduction="batchmean")) / 2
    seen = Seen(teacher, teacher, torch.zeros(1), student_logits=student)
    torch.testing.assert_close(Competition(1.0)(seen)[0], -wanted)


def test_deepinversion_tells_the_share_of_its_steps(teacher):
    seen, own = [], method(teacher, "deepinversion(steps=2, group=2)")
    own.on_progress = seen.append
    own([0, 3])  # of two groups
    assert seen == [0.25, 0.5, 0.75, 1]


def test_deepinversion_names_images_that_are_not_finite(teacher):
    with pytest.raises(NotFinite, match=r"the images \[0, 1, 2\] are not finite.*lower lr"):
        method(teacher, "deepinversion(steps=3, bn_weight=1e300, group=3)")(range(3))


def test_settings_enter_the_identity(teacher):
    plain, other = (method(teacher, f"deepinversion{more}").identity() for more in ("", "(steps=200, group=4)"))
    changed = {name for name in plain if plain[name] != other[name]}
    assert changed == {"steps", "group"} and other["group"] == 4 and plain["teacher_digest"] == teacher.digest()
    assert method(teacher, "noise(grey=0.2)").identity() != method(teacher, "noise").identity()
    assert method(teacher, "noise", size=16)([0]).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "text, words",
    [
        ("deepinversion(steps=-1)", "steps is -1: it must be at least 0. correct its settings"),
        ("deepinversion(steps=2.5)", "steps is 2.5: it must be a whole number"),
        ("deepinversion(lr=fast)", "lr is 'fast': it must be a number"),
        ("deepinversion(speed=3)", "speed"),
        ("noise(grey=dark)", "it must be a number"),
        ("noise(grey=2)", "grey is 2: it must be at least 0 and at most 1"),
        ("FILE:Missing", "has no 'Missing'"),
        ("FILE:NoSynthesizer", "it lacks image_size, group, identity"),
        ("FILE:Constant(lvel=3)", "lvel"),
        ("FILE:Constant(", "cannot be read"),
    ],
)
def test_methods_that_cannot_be_made(teacher, own_method, text, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        method(teacher, text.replace("FILE", str(own_method)))


@pytest.mark.parametrize("name", ["Fails", "Refuses", "Cannot"])
def test_what_a_method_raises_itself_comes_through(teacher, own_method, name):
    kind = {"Fails": TypeError, "Refuses": UsageError, "Cannot": EngineError}[name]
    with pytest.raises(kind, match="its own words"):
        method(teacher, f"{own_method}:{name}")


OWN = """
import torch
from dfkd.errors import UsageError
from dfkd_engine.errors import EngineError
from dfkd.synthesis.synthesizer import Sample, records_of


class Constant:
    name, group, needs_prior = "constant", 1, False

    def __init__(self, prior, teacher, config, level=0.5):
        self.class_names, self.image_size, self.level = teacher.class_names, teacher.input_size, level

    def identity(self):
        return {"level": self.level}

    def __call__(self, ids, labels=None, seed=0):
        labels = torch.tensor(labels or [i % len(self.class_names) for i in ids])
        images = torch.full((len(ids), 3, self.image_size, self.image_size), int(255 * self.level)).byte()
        return Sample(images, labels, records_of(ids, labels, self.class_names, seed))


class NoSynthesizer:
    name, class_names = "no", ()

    def __init__(self, prior, teacher, config):
        pass


def Fails(prior, teacher, config):
    raise TypeError("its own words")


def Refuses(prior, teacher, config):
    raise UsageError("its own words")


def Cannot(prior, teacher, config):
    raise EngineError("its own words", "why", "what to do")
"""


@pytest.fixture
def own_method(tmp_path):
    file = tmp_path / "own_method.py"
    file.write_text(OWN)
    return file


def test_a_method_in_a_file_of_ones_own(teacher, own_method):
    config = GenerateConfig.of(method=f"{own_method}:Constant(level=0.25)")
    assert not needs_prior(config) and needs_prior(GenerateConfig()) and tuple(METHODS) == NAMES
    made = make_method(config, None, teacher)
    assert identity_of(made, 0)["settings"] == {"level": 0.25}
    assert made([4, 5]).images.unique().tolist() == [63] and made.class_names == CLASS_NAMES


def test_settings_that_a_method_does_not_go_by_are_named(teacher):
    config = GenerateConfig.preset("demo", method="deepinversion", device="cpu", group=100, size=8)
    names = unread(make_method(config, None, teacher), config)
    assert {"steps", "cfg", "refine_steps"} <= set(names) and not {"group", "size", "device", "batch"} & set(names)
    assert unread(object(), config) == ()
    filtered = GenerateConfig.of(method="noise", guide_flip=True, guide_shift=1, filter_views=2, size=8)
    assert unread(make_method(filtered, None, teacher), filtered) == ("guide_shift",)  # the filter mirrors
