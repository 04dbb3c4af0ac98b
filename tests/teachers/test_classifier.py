"""Classifiers: how they are fed; what is saved comes back, and what does not fit is refused with a reason."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from dfkd import teachers
from dfkd.config import NORMALISATIONS, TeacherConfig
from dfkd.errors import UsageError
from dfkd.teachers import Classifier, load_teacher

NAMES = ("cat", "dog", "owl")
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
DESCRIBED = {"architecture": "resnet8", "class_names": NAMES, "mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def trained() -> Classifier:
    torch.manual_seed(0)
    network = teachers.build("resnet8", 3)
    network(torch.randn(4, 3, 32, 32))  # moves the running statistics off their start
    return Classifier(network, NAMES, MEAN, STD, 32, "resnet8").eval()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    trained.to(memory_format=torch.channels_last).save_pretrained(path, accuracy=0.5)  # as training leaves it
    trained.to(memory_format=torch.contiguous_format)
    return path


def test_prepare_normalises_and_keeps_the_right_size_untouched(trained):
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    prepared = trained.prepare(images)
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, (images[:, 1] - 0.2) / 0.25, (images[:, 2] - 0.3) / 2], dim=1)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-12)


def test_prepare_resizes_differentiably(trained):
    images = torch.rand(1, 3, 48, 40, requires_grad=True)
    prepared = trained.prepare(images)
    assert prepared.shape == (1, 3, 32, 32)
    prepared.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@torch.no_grad()
def test_called_with_tensors_and_pictures(trained):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    wanted = trained.logits(pixels.float() / 255)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    for images in (pixels, pixels.float() / 255, pictures):
        torch.testing.assert_close(trained(images), wanted)
    torch.testing.assert_close(trained(pictures[0]), wanted[:1], rtol=1e-4, atol=1e-4)
    assert trained(Image.new("L", (90, 41))).shape == (1, 3)


def test_a_picture_is_cut_in_the_middle(trained):
    """A wide picture with one colour in its middle square is that colour."""
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    with torch.no_grad():
        plain = trained(Image.fromarray(np.full((32, 32, 3), 200, np.uint8)))
        torch.testing.assert_close(trained(Image.fromarray(wide)), plain)


def test_like_a_module(trained):
    assert trained.to("cpu") is trained and trained.device == torch.device("cpu")
    assert len(list(trained.parameters())) == len(list(trained.module.parameters()))
    other = trained.replace(input_size=16)
    assert (other.input_size, other.module) == (16, trained.module)
    assert other.digest() != trained.digest()
    with pytest.raises(UsageError, match="three channels"):
        Classifier(trained.module, NAMES, (0.5,), STD, 32)


def test_batch_norms_in_definition_order(trained):
    layers = trained.batch_norms()
    assert len(layers) == 9
    assert layers[0] is trained.module.bn1


def test_round_trip(trained, folder):
    for path in (folder, str(folder), folder / "model.safetensors"):
        loaded = Classifier.from_pretrained(path)
        assert loaded.replace(module=trained.module) == trained
        assert not loaded.module.training
        assert loaded.digest() == trained.digest()
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["accuracy"]) == (3, 0.5)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_how_it_is_shown_larger_images_is_kept_with_it(trained, tmp_path):
    """A folder written before there was a choice has none, and is shown them by the default."""
    other = trained.replace(resize="published")
    other.save_pretrained(tmp_path)
    assert Classifier.from_pretrained(tmp_path).resize == "published" and other.digest() != trained.digest()
    config = TeacherConfig.of(teacher_checkpoint=tmp_path)
    assert load_teacher(config).resize == "published"
    assert load_teacher(config.replace(resize="antialias")).resize == "antialias"
    facts = json.loads((tmp_path / "config.json").read_text())
    for value, found in ((None, "antialias"), ("area", "resize 'area': known are"), (3, "resize is 3")):
        facts.pop("resize", None)
        (tmp_path / "config.json").write_text(json.dumps(facts | ({} if value is None else {"resize": value})))
        if value is None:
            assert Classifier.from_pretrained(tmp_path).resize == found
        else:
            with pytest.raises(UsageError, match=found):
                Classifier.from_pretrained(tmp_path)


def test_overrides(folder):
    given = {"class_names": ("x", "y", "z"), "mean": (0, 0, 0), "std": (1, 1, 1), "input_size": 64}
    given["resize"] = "published"
    loaded = Classifier.from_pretrained(folder, architecture="resnet8", **given)
    assert {name: getattr(loaded, name) for name in given} == given


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_layout(trained, tmp_path, prefix, wrap):
    torch.save(wrap({prefix + key: value for key, value in trained.state_dict().items()}), tmp_path / "t.pth")
    assert Classifier.from_pretrained(tmp_path / "t.pth", **DESCRIBED).digest() == trained.digest()


def test_bare_safetensors_need_their_description(trained, tmp_path):
    file = tmp_path / "t.safetensors"
    safetensors.torch.save_file(trained.state_dict(), file)
    assert Classifier.from_pretrained(file, **DESCRIBED).digest() == trained.digest()
    with pytest.raises(UsageError, match="missing: class names, std"):
        Classifier.from_pretrained(file, architecture="resnet8", mean=MEAN)


class Gadget:
    """An object that a pickle would have to build."""


def test_what_does_not_fit_is_refused(trained, tmp_path):
    file = tmp_path / "t.pth"
    torch.save({"state_dict": Gadget()}, file)
    with pytest.raises(UsageError, match=r"holds no state dict.*a whole pickled object.*Gadget"):
        Classifier.from_pretrained(file, **DESCRIBED)
    state = dict(trained.state_dict())
    torch.save(state, file)
    with pytest.raises(UsageError, match=r"fc\.weight is \(3, 64\), wanted \(2, 64\)"):
        Classifier.from_pretrained(file, **DESCRIBED | {"class_names": ("cat", "dog")})
    del state["bn1.weight"]
    torch.save(state | {"extra": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=r"1 absent, e\.g\. bn1\.weight; 1 unknown, e\.g\. extra"):
        Classifier.from_pretrained(file, **DESCRIBED)


def test_errors_before_work(folder, tmp_path):
    with pytest.raises(UsageError, match="2 class names for a resnet8 of 3 classes"):
        Classifier.from_pretrained(folder, class_names=("cat", "dog"))
    with pytest.raises(UsageError, match="holds a resnet8, not a wrn16_1"):
        Classifier.from_pretrained(folder, architecture="wrn16_1")
    with pytest.raises(UsageError, match="no checkpoint"):
        Classifier.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no weights of its own"):
        Classifier.from_pretrained("resnet8")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UsageError, match="cannot read"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "wanted is an object"),
        ("{}", "cannot be used: it does not say 'architecture'"),
        ('{"architecture": "resnet8", "class_names": 3}', "class_names is 3, wanted is a list"),
        ('{"architecture": "resnet8", "class_names": ["a"], "mean": ["x"]}', r'mean\[0\] is "x", wanted is a number'),
    ],
)
def test_a_config_of_another_shape_is_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=words):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["last", "student/last"])
def test_the_folder_of_a_run_is_pointed_to_its_student(trained, tmp_path, part):
    trained.save_pretrained(tmp_path / part)
    with pytest.raises(UsageError, match=f"give {tmp_path / part}"):
        Classifier.from_pretrained(tmp_path)


def test_a_module_of_ones_own(tmp_path):
    source = tmp_path / "nets.py"
    source.write_text("from torch import nn\ndef tiny(n):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3, n))\n")
    name = f"file:{source}:tiny"
    own = Classifier(teachers.build(name, 4), tuple("abcd"), MEAN, STD, 1)
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(UsageError, match="cannot be built"):
        Classifier.from_pretrained(tmp_path / "own")
    loaded = Classifier.from_pretrained(tmp_path / "own", architecture=name)
    assert (loaded.architecture, loaded.state_dict().keys()) == (name, own.state_dict().keys())


def test_transformers_folder(tmp_path):
    """The real library on a model made here: weights, class names, normalisation and size come from its folder."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    config.id2label = dict(enumerate(NAMES))
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 24}, "image_processor_type": "None"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    name = f"transformers:{tmp_path}"
    loaded = Classifier.from_pretrained(name)
    assert loaded.replace(module=model) == Classifier(model, NAMES, MEAN, STD, 24, name)
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(pixel_values=loaded.prepare(images)).logits)
    assert len(loaded.batch_norms()) > 0
    assert isinstance(teachers.build(name, 5), nn.Module)


class TestLoadTeacher:
    def test_a_folder_keeps_its_own(self, trained, folder):
        config = TeacherConfig.of(teacher_checkpoint=folder)
        assert load_teacher(config, ("other", "names", "here")).class_names == NAMES
        assert load_teacher(config.replace(classes=NAMES)).digest() == trained.digest()
        with pytest.raises(UsageError, match="the teacher has 3: cat, dog, owl"):
            load_teacher(config.replace(classes=("dog", "cat", "owl")))

    def test_options_act_on_every_source(self, trained, folder, tmp_path):
        torch.save(trained.state_dict(), tmp_path / "t.pth")
        options = {"teacher": "resnet8", "teacher_input_size": 24}
        for checkpoint in (folder, tmp_path / "t.pth"):
            config = TeacherConfig.of(teacher_checkpoint=checkpoint, normalisation="cifar10", **options)
            loaded = load_teacher(config, NAMES)
            assert (loaded.input_size, (loaded.mean, loaded.std)) == (24, NORMALISATIONS["cifar10"])
            config = TeacherConfig.of(teacher_checkpoint=checkpoint, teacher_mean=MEAN, teacher_std=STD, **options)
            loaded = load_teacher(config, NAMES)
            assert (loaded.input_size, loaded.mean, loaded.std) == (24, MEAN, STD)
        assert all(word in loaded.described() for word in ("resnet8", "3 classes", "24 x 24", "0.1, 0.2, 0.3"))

    def test_nothing_given(self):
        with pytest.raises(UsageError, match="no teacher is given"):
            load_teacher(TeacherConfig.of())
