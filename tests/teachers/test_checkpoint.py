"""Checkpoints: what is saved comes back, what does not fit is refused with a reason."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from dfkd import teachers
from dfkd.errors import UsageError
from dfkd.teachers import checkpoint
from dfkd.teachers.classifier import Classifier

NAMES = ("cat", "dog", "owl")
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture
def trained() -> Classifier:
    torch.manual_seed(0)
    network = teachers.build("resnet8", 3)
    network(torch.randn(4, 3, 32, 32))  # moves the running statistics off their start
    return Classifier(network.eval(), "resnet8", NAMES, 32, MEAN, STD)


def same(one: Classifier, other: Classifier) -> bool:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(one.logits(images), other.logits(images))


def test_round_trip(trained, tmp_path):
    trained.module.to(memory_format=torch.channels_last)  # as training leaves it
    checkpoint.save(tmp_path / "teacher", trained, {"accuracy": 0.5})
    for path in (tmp_path / "teacher", tmp_path / "teacher" / "model.safetensors"):
        loaded = checkpoint.load(None, path)
        assert (loaded.architecture, loaded.class_names, loaded.input_size) == ("resnet8", NAMES, 32)
        assert (loaded.mean, loaded.std) == (MEAN, STD)
        assert not loaded.module.training
        assert all(
            torch.equal(a, b)
            for a, b in zip(loaded.module.state_dict().values(), trained.module.state_dict().values(), strict=True)
        )
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert (config["num_classes"], config["accuracy"]) == (3, 0.5)
    assert sorted(file.name for file in (tmp_path / "teacher").iterdir()) == ["config.json", "model.safetensors"]


def test_overrides(trained, tmp_path):
    checkpoint.save(tmp_path, trained)
    loaded = checkpoint.load("resnet8", tmp_path, ("x", "y", "z"), (0, 0, 0), (1, 1, 1), 64)
    assert (loaded.class_names, loaded.mean, loaded.std, loaded.input_size) == (
        ("x", "y", "z"),
        (0, 0, 0),
        (1, 1, 1),
        64,
    )


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_published_layout(trained, tmp_path, prefix, wrapped):
    state = {prefix + key: value for key, value in trained.module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "arch": "resnet8"} if wrapped else state, tmp_path / "t.pth")
    assert same(checkpoint.load("resnet8", tmp_path / "t.pth", NAMES, MEAN, STD), trained)


def test_bare_safetensors(trained, tmp_path):
    safetensors.torch.save_file(trained.module.state_dict(), tmp_path / "t.safetensors")
    assert same(checkpoint.load("resnet8", tmp_path / "t.safetensors", NAMES, MEAN, STD), trained)


def test_a_bare_file_needs_its_description(trained, tmp_path):
    torch.save(trained.module.state_dict(), tmp_path / "t.pt")
    with pytest.raises(UsageError, match="missing: class names, std"):
        checkpoint.load("resnet8", tmp_path / "t.pt", mean=MEAN)


class Gadget:
    """An object that a pickle would have to build."""


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"state_dict": Gadget()}, tmp_path / "t.pth")
    with pytest.raises(UsageError, match="cannot read"):
        checkpoint.load("resnet8", tmp_path / "t.pth", NAMES, MEAN, STD)


def test_every_weight_is_wanted(trained, tmp_path):
    state = trained.module.state_dict()
    del state["bn1.weight"]
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(UsageError, match=r"1 absent, e\.g\. bn1\.weight; 1 unknown, e\.g\. extra"):
        checkpoint.load("resnet8", tmp_path / "t.pth", NAMES, MEAN, STD)


def test_class_count_must_agree(trained, tmp_path):
    torch.save(trained.module.state_dict(), tmp_path / "t.pth")
    with pytest.raises(UsageError, match=r"fc\.weight is \(3, 64\), wanted \(2, 64\)"):
        checkpoint.load("resnet8", tmp_path / "t.pth", ("cat", "dog"), MEAN, STD)
    checkpoint.save(tmp_path / "ours", trained)
    with pytest.raises(UsageError, match="2 class names for a resnet8 of 3 classes"):
        checkpoint.load(None, tmp_path / "ours", ("cat", "dog"))


def test_errors_before_work(trained, tmp_path):
    checkpoint.save(tmp_path / "ours", trained)
    with pytest.raises(UsageError, match="holds a resnet8, not a wrn16_1"):
        checkpoint.load("wrn16_1", tmp_path / "ours")
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.load(None, tmp_path / "nothing")
    with pytest.raises(UsageError, match="give a checkpoint"):
        checkpoint.load("resnet8", None)
    with pytest.raises(UsageError, match="no classifier given"):
        checkpoint.load(None, None)
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UsageError, match="cannot read"):
        checkpoint.load(None, tmp_path / "ours")


def test_network_from_a_file(tmp_path):
    source = tmp_path / "nets.py"
    source.write_text("from torch import nn\ndef tiny(n):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3, n))\n")
    name = f"file:{source}:tiny"
    network = teachers.build(name, 4)
    assert network(torch.zeros(2, 3, 1, 1)).shape == (2, 4)
    checkpoint.save(tmp_path / "ours", Classifier(network, name, ("a", "b", "c", "d"), 1, MEAN, STD))
    assert checkpoint.load(None, tmp_path / "ours").module.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(UsageError, match="no function 'huge'"):
        teachers.build(f"file:{source}:huge", 4)
    with pytest.raises(UsageError, match="no file"):
        teachers.build(f"file:{tmp_path}/none.py:tiny", 4)


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
    loaded = checkpoint.load(name, None)
    assert (loaded.class_names, loaded.mean, loaded.std, loaded.input_size) == (NAMES, MEAN, STD, 24)
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(images), model(pixel_values=loaded.prepare(images)).logits)
    assert len(loaded.batch_norms()) > 0
    assert isinstance(teachers.build(name, 5), nn.Module)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_absent_library_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UsageError, match=f"pip install {library}"):
        teachers.build(f"{library}:resnet18", 10)
    with pytest.raises(UsageError, match=f"pip install {library}"):
        checkpoint.load(f"{library}:resnet18", None)


def test_timm_and_torchvision_build():
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    for name in ("timm:resnet10t", "torchvision:resnet18"):
        assert teachers.build(name, 3).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(UsageError, match="cannot build"):
        teachers.build("timm:no_such_model", 3)
