"""Places of feature maps: the zoo's, those of networks of others, and networks that have none."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd import teachers
from dfkd.training.consistency import compared
from dfkd.training.feature_maps import ZOO, Head, find, tapped
from dfkd.errors import UsageError
from tests.training.small_run import settings

HEADS = {
    "wrn16_1": Head("fc", "bn1", True),
    "resnet8": Head("fc", "layer3", False),
    "resnet18": Head("linear", "layer4", False),
    "resnet18_imagenet": Head("fc", "layer4", False),
    "vgg8": Head("classifier", "block4", False),
    "mobilenetv2": Head("classifier.1", "features", False),
    "shufflenetv2": Head("linear", "bn2", True),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return teachers.build(name, 5)


@pytest.mark.parametrize("name", HEADS)
def test_the_zoo(name: str) -> None:
    network = build(name)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    places = find(network, 32, "student")
    assert places.head == HEADS[name] and network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), tapped(network.eval(), places) as taken:
        logits = network(images)
    assert taken.last is not None
    linear = network.get_submodule(places.head.linear)
    torch.testing.assert_close(linear(taken.last.mean((2, 3))), logits)
    cells = [value.shape[2] * value.shape[3] for value in taken.stages]
    assert len(cells) == 3 and cells == sorted(cells, reverse=True) and len(set(cells)) == 3


def test_every_network_of_the_zoo_is_written_down() -> None:
    assert {type(build(name)) for name in teachers.names()} == set(ZOO)


class Dense(nn.Module):
    """As others write networks: a stem, stages in a list, squeezed channels, the last ReLU a function in place."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList(self._stage(8 * 2**i, 16 * 2**i) for i in range(3))
        self.norm = nn.BatchNorm2d(64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16 * 2**i, 16 * 2**i, 1), nn.Sigmoid()) for i in range(3)
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, classes))

    @staticmethod
    def _stage(channels: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, squeeze in zip(self.stages, self.squeeze, strict=True):
            x = stage(x)
            x = x * squeeze(x)
        x = F.relu(self.norm(x), inplace=True)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def test_a_network_of_someone_else_is_found_by_its_resolutions() -> None:
    """The last of four is the class activation map's; expansions inside of a stage are no stages."""
    places = find(Dense(5), 32, "teacher")
    assert places.head == Head("head.1", "norm", False)  # in place: what the module gave is what is averaged
    assert places.stages == ("stem", "stages.0", "stages.1")


def test_stages_by_name() -> None:
    places = find(build("resnet8"), 32, "student", stages=("bn1", "layer1.0"))
    assert places.stages == ("bn1", "layer1.0")
    with pytest.raises(UsageError, match=r"--msarc-student-stages names 'layer9'.*no such module.*layer"):
        find(build("resnet8"), 32, "student", stages=("layer9",))
    with pytest.raises(UsageError, match=r"names 'fc': it gives no feature map"):
        find(build("resnet8"), 32, "student", stages=("fc",))


class Unpooled(nn.Module):
    """Every cell has weights of its own, as in the VGG of ImageNet."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(4 * 256, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).flatten(1))
        return logits


def test_what_has_no_maps_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"the student has no class activation maps.*--msarc-maps gradcam"):
        find(Unpooled(5), 32, "student")
    with pytest.raises(UsageError, match=r"of 1 sizes: 16x16 \(features\).*--msarc-student-stages"):
        find(Unpooled(5), 32, "student", cam=False)
    assert find(Unpooled(5), 32, "student", cam=False, stages=("features.0",)).stages == ("features.0",)
    with pytest.raises(UsageError, match="2 stages of the teacher and 3 of the student"):
        options = settings(msarc_weight=1.0, msarc_teacher_stages=("layer1", "layer2"))
        compared(build("resnet8"), build("resnet20"), 32, options)


def test_a_transformer_and_a_convolutional_network_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig

    from dfkd.teachers.adapters import Logits

    torch.manual_seed(0)
    depths = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    residual = ResNetConfig(embedding_size=8, layer_type="basic", num_labels=5, **depths)
    network = Logits(AutoModelForImageClassification.from_config(residual))
    places = find(network, 64, "teacher")
    assert places.head is not None and places.head.linear == "model.classifier.1"
    assert places.stages == tuple(f"model.resnet.encoder.stages.{stage}" for stage in range(3))
    looks = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=5)
    looks.image_size, looks.patch_size = 32, 8
    with pytest.raises(UsageError, match="the teacher has no class activation maps"):
        find(Logits(AutoModelForImageClassification.from_config(looks)), 32, "teacher")
    with pytest.raises(UsageError, match="--msarc-maps cam"):
        find(Logits(AutoModelForImageClassification.from_config(looks)), 32, "teacher", cam=False)


def test_a_weight_of_0_looks_for_nothing() -> None:
    """Not even a pass: these are no networks."""
    assert compared(nn.Identity(), nn.Identity(), 32, settings()) is None


def test_options_that_would_not_act_are_refused() -> None:
    with pytest.raises(UsageError, match="act with --msarc-weight above 0"):
        settings(msarc_maps="cam")
    with pytest.raises(UsageError, match="act with --msarc-weight above 0"):
        settings(msarc_student_stages=("layer1",))
    for other in ({"compile": "default"}, {"cuda_graph": True}, {"sync_bn": "on"}):
        with pytest.raises(UsageError, match="--msarc-weight with --"):
            settings(msarc_weight=1.0, **other)
    assert settings(msarc_weight=1.0, msarc_maps="cam", sync_bn="on").sync_bn == "on"
    with pytest.raises(UsageError, match="--msarc-maps cam takes no stages"):
        settings(msarc_weight=1.0, msarc_maps="cam", msarc_teacher_stages=("layer1",))
