"""The zoo: names and shapes of the published checkpoints' weights, so that those load strictly."""

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch

from dfkd import teachers
from dfkd.config import TeacherConfig
from dfkd.errors import UsageError

# Name -> trainable parameters, digest of the sorted "key shape" lines of the state dict; both with 10 classes.
PUBLISHED = {
    "wrn16_1": (175_066, "90ca02d6f00f"),
    "wrn16_2": (691_674, "36963aae9908"),
    "wrn40_1": (563_930, "ac02a671cfee"),
    "wrn40_2": (2_243_546, "0b55f662b02a"),
    "resnet8": (78_042, "2c574c96e7f2"),
    "resnet8_half": (175_426, "deb12ded4f89"),
    "resnet20": (272_474, "d0646ea64748"),
    "resnet32": (466_906, "75fda7e6a7af"),
    "resnet56": (855_770, "d1812bc89522"),
    "resnet110": (1_730_714, "4d517c7b29cc"),
    "resnet8x4": (1_210_410, "f97bc30bde40"),
    "resnet32x4": (7_410_730, "c57969bb157e"),
    "resnet18": (11_173_962, "15e99edfd6f7"),
    "resnet34": (21_282_122, "16658fd839bd"),
    "resnet50": (23_520_842, "f9d2a07c0dfb"),
    "resnet18_imagenet": (11_181_642, "475ae55b6d26"),
    "resnet34_imagenet": (21_289_802, "713c5c32cb70"),
    "resnet50_imagenet": (23_528_522, "5666a3a91640"),
    "vgg8": (3_918_858, "7d24f94177ab"),
    "vgg11": (9_231_114, "3d5eec801e23"),
    "vgg13": (9_416_010, "49776e796545"),
    "mobilenetv2": (2_236_682, "dc7b0abda483"),
    "shufflenetv2": (1_263_278, "1d74bf546372"),
}


def on_meta(name: str, num_classes: int = 10) -> torch.nn.Module:
    with torch.device("meta"):
        return teachers.build(name, num_classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_loads_strictly(name):
    network = on_meta(name)
    keys = "\n".join(f"{key} {tuple(value.shape)}" for key, value in sorted(network.state_dict().items()))
    parameters = sum(weight.numel() for weight in network.parameters())
    assert (parameters, hashlib.sha256(keys.encode()).hexdigest()[:12]) == PUBLISHED[name], keys


def test_imagenet_sizes_are_torchvisions():
    sizes = {"resnet18_imagenet": 11_689_512, "resnet34_imagenet": 21_797_672, "resnet50_imagenet": 25_557_032}
    assert {name: sum(weight.numel() for weight in on_meta(name, 1000).parameters()) for name in sizes} == sizes


@pytest.mark.parametrize("name", teachers.names())
def test_logits(name):
    size = teachers.input_size(name)
    assert on_meta(name, 7)(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)


def test_every_network_of_the_zoo_is_known_here():
    assert set(PUBLISHED) == set(teachers.names())


@pytest.mark.parametrize("name", ["wrn16_1", "resnet8", "resnet8_half", "vgg8", "shufflenetv2"])
def test_an_image_is_classified_alone(name):
    """In evaluation mode a row of the batch does not depend on the others."""
    torch.manual_seed(0)
    network = teachers.build(name, 5).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = network(images), network(images[1:2])
    assert together.isfinite().all()
    # The only difference is the order of float32 sums in convolutions of other shapes.
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_unknown_name_names_the_nearest():
    with pytest.raises(UsageError, match="wrn40_2"):
        teachers.build("wrn-40-2", 10)
    with pytest.raises(UsageError, match="prefix"):
        teachers.build("caffe:alexnet", 10)


def test_network_from_a_file(tmp_path):
    source = tmp_path / "nets.py"
    source.write_text("from torch import nn\ndef tiny(n, bias=True):\n    return nn.Linear(3, n, bias=bias)\n")
    assert teachers.build(f"file:{source}:tiny(bias=False)", 4).state_dict().keys() == {"weight"}
    with pytest.raises(UsageError, match=r"fails: TypeError: .*'wide'"):
        teachers.build(f"file:{source}:tiny(wide=1)", 4)
    with pytest.raises(UsageError, match="no 'huge'"):
        teachers.build(f"file:{source}:huge", 4)
    with pytest.raises(UsageError, match="no file"):
        teachers.build(f"file:{tmp_path}/none.py:tiny", 4)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_absent_library_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for load in (lambda name: teachers.build(name, 10), teachers.Classifier.from_pretrained):
        with pytest.raises(UsageError, match=f"pip install {library}"):
            load(f"{library}:resnet18")


class FakeTimm:
    """timm's functions that are used, on a network of four classes."""

    data = SimpleNamespace(
        resolve_model_data_config=lambda model: {"mean": (0.1,) * 3, "std": (0.2,) * 3, "input_size": (3, 24, 24)},
        infer_imagenet_subset=lambda model: model.subset,
        ImageNetInfo=lambda subset: SimpleNamespace(
            label_descriptions=lambda: ["tench, Tinca tinca", "crane", "goldfish", "crane, bird"]
        ),
    )

    @staticmethod
    def create_model(name, pretrained):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 4))
        model.num_classes, model.subset = 4, "imagenet-1k" if name == "known" else None
        return model


def test_timm_says_how_its_models_are_fed_and_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm())
    found = teachers.Classifier.from_pretrained("timm:known")
    assert found.class_names == ("tench", "crane 1", "goldfish", "crane 3")
    assert (found.mean, found.std, found.input_size, found.architecture) == ((0.1,) * 3, (0.2,) * 3, 24, "timm:known")
    assert teachers.Classifier.from_pretrained("timm:other").class_names == ("0", "1", "2", "3")
    named = teachers.load_teacher(TeacherConfig.of(teacher="timm:other"), tuple("abcd"))
    assert named.class_names == tuple("abcd")
