"""How a classifier is fed and read: by what is given, else by what its source says, and never by a guess."""

import json

import pytest
import safetensors.torch
import torch

from dfkd.config import TeacherConfig
from dfkd.config.lists import names_in
from dfkd.errors import SettingError, UsageError
from dfkd.teachers import Classifier, load_teacher
from dfkd.teachers.sources import own_names
from tests.teachers.weight_files import NAMES, SOURCE, describe, weights

NET = SOURCE.replace("net.input_size, net.mean, net.std = 12, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)", "")
FED = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
FACTS = "input_size, {0}.mean, {0}.std, {0}.class_names = 12, [0.5] * 3, [0.25] * 3, ['bright', 'dark', 'grey']"


@pytest.fixture
def weight_file(tmp_path):
    torch.save(weights(), tmp_path / "t.pth")
    return tmp_path / "t.pth"


def network(folder, text: str) -> str:
    (folder / "net.py").write_text(text)
    return f"file:{folder / 'net.py'}:net"


def fed(found: Classifier) -> tuple:
    return found.input_size, found.mean, found.std, found.class_names


STATED = {
    "the function": f"{NET}\nnet.{FACTS.format('net')}",
    "the module": NET.replace(
        "    return nn.Sequential(features",
        f"    made = nn.Sequential(features, nn.Linear(3, num_classes))\n    made."
        f"{FACTS.format('made')}\n    return made\n    return nn.Sequential(features",
    ),
    "a function that knows its classes": f"{NET}\nmake = net\nnet = lambda: make(3)\nnet.{FACTS.format('net')}",
    "a function with other settings": f"{NET}\nmake = net\ndef net(wide=2, *, num_classes=10): return make(num_classes)"
    f"\nnet.{FACTS.format('net')}",
    "a module itself": f"{NET}\nnet = net(3)\nnet.{FACTS.format('net')}",
    "a shape": f"{NET}\nnet.{FACTS.format('net')}\nnet.input_size = (3, 12, 12)",
}


@pytest.mark.parametrize("form", STATED)
def test_a_file_says_how_its_network_is_fed_and_read(form, weight_file, tmp_path):
    name = network(tmp_path, STATED[form])
    found = Classifier.from_pretrained(weight_file, architecture=name)
    assert fed(found) == (12, (0.5,) * 3, (0.25,) * 3, NAMES)
    assert load_teacher(TeacherConfig.of(teacher=name, teacher_checkpoint=weight_file), "abc").class_names == NAMES
    given = {"input_size": 8, "mean": (0, 0, 0), "std": (1, 1, 1), "class_names": ("x", "y", "z")}
    found = Classifier.from_pretrained(weight_file, architecture=name, **given)
    assert fed(found) == (8, (0,) * 3, (1,) * 3, ("x", "y", "z"))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("input_size = 'big'", "has input_size = 'big'"),
        ("input_size = (3, 32, 24)", "wanted is a side in pixels"),
        ("mean = (0.5, 0.5)", "wanted is three numbers"),
        ("mean = (120, 110, 100)", "divide those of 0..255 by 255"),
        ("class_names = 'cat'", "wanted is a list of names"),
        ("class_names = ('a', 'b')", r"does not fit .* with 2 classes"),
    ],
)
def test_what_a_file_says_is_looked_at(facts, words, weight_file, tmp_path):
    name = network(tmp_path, f"{NET}\nnet.{FACTS.format('net')}\nnet.{facts}")
    with pytest.raises(UsageError, match=words):
        Classifier.from_pretrained(weight_file, architecture=name)


def test_tensors_of_these_names_are_the_networks_own(weight_file, tmp_path):
    """A layer that normalises keeps `mean`, and must not have it done twice."""
    text = NET.replace("    features =", "    import torch\n    features =").replace("def net", "def built")
    text += "\ndef net(num_classes):\n    import torch\n    made = built(num_classes)\n"
    text += "    made.mean = torch.zeros(3)\n    made.input_size = 12\n    return made\n"
    with pytest.raises(UsageError, match=r"missing: mean, std.*give --teacher-mean, --teacher-std"):
        Classifier.from_pretrained(weight_file, architecture=network(tmp_path, text), class_names=NAMES)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "file"])
def test_no_side_is_assumed(name, weight_file, tmp_path):
    name = network(tmp_path, NET) if name == "file" else name
    config = TeacherConfig.of(teacher=name, teacher_checkpoint=weight_file, normalisation="imagenet", classes=NAMES)
    with pytest.raises(UsageError, match=r"missing: input size\. give --teacher-input-size"):
        load_teacher(config)


def test_a_network_of_the_zoo_knows_its_side(tmp_path):
    from dfkd import teachers

    torch.save(teachers.build("resnet8", 3).state_dict(), tmp_path / "t.pth")
    config = TeacherConfig.of(teacher="resnet8", teacher_checkpoint=tmp_path / "t.pth", teacher_mean="none")
    config = config.replace(teacher_std="None", classes="cat,dog,owl")
    assert fed(load_teacher(config)) == (32, (0,) * 3, (1,) * 3, ("cat", "dog", "owl"))
    assert "fed 32 x 32 pixels, in 0..1" in load_teacher(config).described()
    assert load_teacher(config.replace(teacher_input_size=64)).input_size == 64
    for wrong, words in (({"teacher_mean": "123,116,103"}, "divide"), ({"teacher_std": "0,1,1"}, "std 0.0, 1.0, 1.0")):
        with pytest.raises(SettingError, match=words):
            config.replace(**wrong)


class TestFolders:
    def test_ours_by_its_weight_file_too(self, tmp_path):
        safetensors.torch.save_file(weights(), tmp_path / "model.safetensors")
        describe(tmp_path)
        for source in (tmp_path, tmp_path / "model.safetensors"):
            found = load_teacher(TeacherConfig.of(teacher_checkpoint=source))
            assert fed(found) == (12, (0.5,) * 3, (0.25,) * 3, NAMES)

    def test_a_file_that_lies_elsewhere_now(self, tmp_path):
        safetensors.torch.save_file(weights(), tmp_path / "model.safetensors")
        describe(tmp_path)
        (tmp_path / "net.py").rename(tmp_path / "moved.py")
        with pytest.raises(UsageError, match=r"no file .*net\.py"):
            Classifier.from_pretrained(tmp_path)
        found = Classifier.from_pretrained(tmp_path, architecture=f"file:{tmp_path / 'moved.py'}:net")
        assert found.architecture.endswith("moved.py:net") and found.class_names == NAMES

    def test_weights_alone(self, weight_file, tmp_path):
        with pytest.raises(UsageError, match=r"has no config.json.*give .*t\.pth and say what it is"):
            Classifier.from_pretrained(tmp_path)

    def test_the_same_names_in_another_order(self, tmp_path):
        safetensors.torch.save_file(weights(), tmp_path / "model.safetensors")
        describe(tmp_path)
        with pytest.raises(UsageError, match="logit 0 is 'bright' to it, and 'dark' in the given names"):
            Classifier.from_pretrained(tmp_path, class_names=("dark", "bright", "grey"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small ViT as transformers saves it, with the file of its image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**small, image_size=16, patch_size=8, num_labels=3, id2label=dict(enumerate(NAMES)))
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    processor = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_processor_type": "ViT"}))
    return folder, model


def copied(folder, to, **changes):
    """The folder with other contents of its two JSON files, None for an entry that is taken out."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    for file in ("config.json", "preprocessor_config.json"):
        facts = {**json.loads((to / file).read_text()), **changes.get(file.split(".")[0], {})}
        (to / file).write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    return to


class TestTransformers:
    def test_a_folder_is_read_as_it_is(self, vit):
        folder, model = vit
        for source in (folder, f"transformers:{folder}", folder / "model.safetensors"):
            found = Classifier.from_pretrained(source)
            assert fed(found) == (16, (0.4,) * 3, (0.2,) * 3, NAMES)
            images = torch.rand(2, 3, 16, 16)
            with torch.no_grad():
                torch.testing.assert_close(found(images), model((images - 0.4) / 0.2).logits)

    def test_weights_of_ones_own_in_its_architecture(self, vit, tmp_path):
        folder, model = vit
        torch.save({"state_dict": model.state_dict()}, tmp_path / "t.pth")
        found = Classifier.from_pretrained(tmp_path / "t.pth", architecture=f"transformers:{folder}", class_names=NAMES)
        assert fed(found) == (16, (0.4,) * 3, (0.2,) * 3, NAMES)
        found.save_pretrained(tmp_path / "ours")
        assert Classifier.from_pretrained(tmp_path / "ours").digest() == found.digest()

    @pytest.mark.parametrize(
        ("processor", "wanted"),
        [
            ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)),
            ({"rescale_factor": 2 / 255}, ((0.2,) * 3, (0.1,) * 3)),
            ({"size": {"shortest_edge": 16}, "crop_size": None}, ((0.4,) * 3, (0.2,) * 3)),
            ({"size": 32, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}, ((0.4,) * 3, (0.2,) * 3)),
        ],
    )
    def test_what_its_processor_does(self, vit, tmp_path, processor, wanted):
        found = Classifier.from_pretrained(copied(vit[0], tmp_path, preprocessor_config=processor))
        assert found.input_size == 16
        torch.testing.assert_close(torch.tensor([found.mean, found.std]), torch.tensor(wanted))

    @pytest.mark.parametrize(
        ("processor", "words"),
        [
            ({"do_rescale": False}, "not rescaled to 0..1"),
            ({"rescale_offset": True}, "not rescaled to 0..1"),
            ({"size": {"height": 16, "width": 24}}, "images of 16 x 24 are not square"),
            ({"image_mean": None}, "nothing of its mean, std.*give --teacher-mean, --teacher-std"),
            ({"size": None}, "nothing of its input size.*give --teacher-input-size"),
        ],
    )
    def test_what_is_not_done_here_is_refused(self, vit, tmp_path, processor, words):
        with pytest.raises(UsageError, match=words):
            Classifier.from_pretrained(copied(vit[0], tmp_path, preprocessor_config=processor))

    def test_options_stand_for_what_is_not_said(self, vit, tmp_path):
        folder = copied(vit[0], tmp_path, preprocessor_config={"image_mean": None, "size": None})
        assert fed(Classifier.from_pretrained(folder, **FED, input_size=16)) == (16, FED["mean"], FED["std"], NAMES)
        (folder / "preprocessor_config.json").unlink()
        assert fed(Classifier.from_pretrained(folder, **FED, input_size=16)) == (16, FED["mean"], FED["std"], NAMES)

    def test_labels_that_are_no_names(self, vit, tmp_path):
        folder = copied(vit[0], tmp_path, config={"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": None})
        config = TeacherConfig.of(teacher_checkpoint=folder)
        assert load_teacher(config).class_names == ("0", "1", "2")
        assert load_teacher(config, ("cat", "dog", "owl")).class_names == ("cat", "dog", "owl")

    def test_a_head_that_would_be_random(self, vit, tmp_path):
        folder = copied(vit[0], tmp_path)
        kept = {k: v for k, v in vit[1].state_dict().items() if not k.startswith("classifier")}
        safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=r"no weights for 2 layers, e\.g\. classifier\.bias"):
            Classifier.from_pretrained(folder)


class TestTimm:
    @pytest.fixture(scope="class")
    def saved(self, timm, tmp_path_factory):
        folder = tmp_path_factory.mktemp("timm")
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
        facts = {"input_size": (3, 32, 32), "label_names": list(NAMES)}
        timm.models.save_for_hf(model, folder, model_config=facts, model_args={"img_size": 32})
        return folder, model

    def test_a_folder_is_read_as_it_is(self, saved):
        folder, model = saved
        for source in (folder, folder / "pytorch_model.bin"):
            found = Classifier.from_pretrained(source)
            assert fed(found) == (32, (0.5,) * 3, (0.5,) * 3, NAMES)
            images = torch.rand(2, 3, 32, 32)
            with torch.no_grad():
                torch.testing.assert_close(found(images), model(images * 2 - 1))

    def test_it_can_be_saved_as_ours(self, saved, tmp_path):
        found = Classifier.from_pretrained(saved[0])
        found.save_pretrained(tmp_path)
        assert Classifier.from_pretrained(tmp_path).digest() == found.digest()

    def test_another_name_beside_it(self, saved):
        with pytest.raises(UsageError, match="holds a timm:test_vit, not a timm:resnet18"):
            Classifier.from_pretrained(saved[0], architecture="timm:resnet18")

    def test_weights_of_ones_own(self, saved, tmp_path):
        torch.save({"state_dict": saved[1].state_dict(), "arch": "test_vit"}, tmp_path / "t.pth")
        name = "timm:test_vit(img_size=32)"
        found = Classifier.from_pretrained(
            tmp_path / "t.pth", architecture=name, class_names=NAMES, **FED, input_size=32
        )
        assert fed(found) == (32, FED["mean"], FED["std"], NAMES)


class TestPublished:
    """Names alone: the libraries' loading code, with the download of weights taken out."""

    def test_torchvision(self, torchvision, monkeypatch):
        model = torchvision.models.shufflenet_v2_x0_5()
        weights = torchvision.models.ShuffleNet_V2_X0_5_Weights
        monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: model.state_dict())
        found = load_teacher(TeacherConfig.of(teacher="torchvision:shufflenet_v2_x0_5"))
        assert (found.input_size, found.mean, found.std) == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (len(found.class_names), found.class_names[134], found.class_names[1]) == (
            1000,
            "crane bird",
            "goldfish",
        )

    def test_timm(self, timm, monkeypatch):
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **given: create(name, **given))
        found = load_teacher(TeacherConfig.of(teacher="timm:test_convnext"))
        assert (found.input_size, len(found.class_names), found.class_names[0]) == (160, 1000, "tench")
        folders = tuple(f"n{number:08d}" for number in range(1000))  # ImageNet's folders, in the order of its logits
        assert load_teacher(TeacherConfig.of(teacher="timm:test_convnext"), folders).class_names == folders
        words = tuple(sorted(found.class_names))  # folders by word, which are in another order
        assert load_teacher(TeacherConfig.of(teacher="timm:test_convnext"), words).class_names == found.class_names

    def test_a_name_that_the_library_does_not_know(self, timm):
        with pytest.raises(UsageError, match=r"cannot load 'timm:resnet1'.*check the name"):
            Classifier.from_pretrained("timm:resnet1")


def test_a_classifier_that_comes_with_the_program_is_named(tmp_path, monkeypatch):
    """By name wherever a checkpoint is; a folder of that name counts first."""
    found = Classifier.from_pretrained("cifar10-mini")
    assert (found.architecture, found.input_size, found.class_names) == ("resnet20", 32, names_in("cifar10"))
    asked = TeacherConfig.of(teacher_checkpoint="cifar10-mini")
    assert load_teacher(asked).digest() == found.digest() and own_names(asked.checkpoint) == found.class_names
    with pytest.raises(UsageError, match="the teacher has 10: airplane"):
        load_teacher(TeacherConfig.of(teacher_checkpoint="cifar10-mini", classes=("cat", "dog")))
    with pytest.raises(UsageError, match="no checkpoint cifar10-mni"):
        Classifier.from_pretrained("cifar10-mni")
    monkeypatch.chdir(tmp_path)
    found.replace(class_names=tuple("abcdefghij")).save_pretrained("cifar10-mini")
    assert Classifier.from_pretrained("cifar10-mini").class_names == tuple("abcdefghij")
