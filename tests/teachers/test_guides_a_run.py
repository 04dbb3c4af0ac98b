"""A teacher of each library guides a small run of dfkd-generate; one without BatchNorm by its class alone."""

import json

import pytest
import torch

from dfkd.cli import generate
from dfkd.data import read_folder
from tests.cli.small_generate import last_line, status_of
from tests.teachers.weight_files import SOURCE

NAMES = ("zero", "one", "two")
SMALL = ("--preset", "demo", "--count", 4, "--group", 4, "--shard-size", 4, "--device", "cpu")
SMALL += ("--steps", 2, "--guide-from", 0.5, "--guidance-repeats", 1, "--refine-steps", 1)
SIDE = 32


def timm_folder(timm, folder, name):
    model = timm.create_model(name, num_classes=3, **({"img_size": SIDE} if "vit" in name else {}))
    facts = {"label_names": list(NAMES), "input_size": (3, SIDE, SIDE)}
    timm.models.save_for_hf(model, folder, model_config=facts, safe_serialization=True)
    return ("--teacher-checkpoint", folder)


def vit(request, folder):
    return timm_folder(request.getfixturevalue("timm"), folder, "test_vit")


def convnext(request, folder):
    return timm_folder(request.getfixturevalue("timm"), folder, "test_convnext")


def torchvision_resnet(request, folder):
    model = request.getfixturevalue("torchvision").models.resnet18(num_classes=3)
    torch.save({"model": model.state_dict(), "epoch": 1}, folder / "t.pth")
    fed = ("--normalisation", "imagenet", "--teacher-input-size", SIDE, "--classes", ",".join(NAMES))
    return ("--teacher", "torchvision:resnet18", "--teacher-checkpoint", folder / "t.pth", *fed)


def transformers_folder(request, folder):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.id2label = dict(enumerate(NAMES))
    ResNetForImageClassification(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": SIDE, "image_processor_type": "X"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return ("--teacher-checkpoint", folder)


def own_file(request, folder):
    (folder / "net.py").write_text(SOURCE.replace("= 12,", f"= {SIDE},"))
    found: dict = {}
    exec(SOURCE, found)
    torch.save(found["net"](3).state_dict(), folder / "t.pth")
    network = ("--teacher", f"file:{folder / 'net.py'}:net", "--teacher-checkpoint", folder / "t.pth")
    return (*network, "--classes", ",".join(NAMES))


@pytest.mark.parametrize("made", [vit, convnext, torchvision_resnet, transformers_folder, own_file])
def test_it_guides_a_run(made, request, tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    torch.manual_seed(0)
    asked = (*SMALL, *made(request, tmp_path / "teacher"), "--out", tmp_path / "out")
    capsys.readouterr()
    if made in (vit, convnext):  # the preset follows BatchNorm's statistics, and is not changed behind one's back
        assert status_of(generate.main, *asked) == 2
        assert "has no BatchNorm layer" in (said := capsys.readouterr().err) and "use --bn-weight 0" in said
        asked = (*asked, "--bn-weight", 0)
    assert status_of(generate.main, *asked) == 0
    printed = capsys.readouterr()
    assert f"3 classes, fed {SIDE} x {SIDE} pixels" in printed.err
    assert last_line(printed.out)["class_names"] == list(NAMES)
    found = read_folder(tmp_path / "out")
    assert len(found.images) == 4
    losses = {"cls"} if made in (vit, convnext) else {"bn", "cls"}
    assert all(record.losses.keys() == losses for record in found.records)
