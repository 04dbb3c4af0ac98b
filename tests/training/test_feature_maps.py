"""Places of feature maps: the zoo's, those of networks of others, and networks that have none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd import teachers
from dfkd.errors import UsageError
from dfkd.training.feature_maps import ZOO, Head, find
from dfkd.training.losses import record_outputs

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
    with torch.no_grad(), record_outputs(network.eval(), places.modules()) as maps:
        logits = network(torch.randn(2, 3, 32, 32))
    last = maps[places.head.last]
    last = F.relu(last) if places.head.relu else last
    torch.testing.assert_close(network.get_submodule(places.head.linear)(last.mean((2, 3))), logits)
    cells = [maps[stage].shape[2] * maps[stage].shape[3] for stage in places.stages]
    assert len(cells) == 3 and cells == sorted(cells, reverse=True) and len(set(cells)) == 3


def test_every_network_of_the_zoo_is_written_down() -> None:
    assert {type(build(name)) for name in teachers.names()} == set(ZOO)


class Dense(nn.Module):
    """A network as other libraries write them: stages in a list, squeezed channels, a last ReLU in place."""

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
