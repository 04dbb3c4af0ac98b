"""Every option of dfkd-generate acts: on the images or their records, or, where a run's identity leaves it out, not."""

import json
import os
import shutil
from dataclasses import fields

import pytest
import torch

from dfkd.cli import prepare
from dfkd.cli.generate import _NOT_IDENTITY
from dfkd.cli.generate_options import GenerateOptions
from dfkd.data.shards import read_manifest
from dfkd_kernels import soft_kl
from tests.cli.small_generate import images_of, save_classifier

# option -> (what both runs take, value of the second run alone); the first has the default or what SMALL gives it
ACTS = {
    "only": ((), "one,zero"),
    "group": ((), 2),
    "seed": ((), 1),
    "dtype": ((), "bf16"),
    "size": ((), 8),
    "sampler": ((), "dpmpp2m"),
    "steps": ((), 2),
    "cfg": ((), 9),
    "cfg_from": (("--cfg", 9), 0.5),
    "cfg_to": (("--cfg", 9), 0.5),
    "prompt": ((), "an a of {label}"),
    "negative_prompt": (("--cfg", 9), "photo of an a to a"),
    "gradient": ((), "unet"),
    "guidance_step": ((), 0.4),
    "guidance_repeats": ((), 3),
    "guidance_norm": ((), "none"),
    "guide_from": ((), 0.5),
    "guide_to": ((), 0.5),
    "bn_weight": ((), 0),
    "cls_weight": ((), 0),
    "adv_weight": (("--student-checkpoint", "STUDENT", "--adv-weight", 1), 30),
    "bn_stats": ((), "image"),
    "bn_loss": ((), "relative"),
    "cutmix_every": ((), 1),
    "cutmix_alpha": (("--cutmix-every", 1), 0.1),
    "noise_edit_steps": ((), 2),
    "noise_edit_scale": (("--noise-edit-steps", 2), 2.0),
    "refine_steps": ((), 3),
    "refine_step": (("--refine-steps", 3), 0.1),
    "normalisation": ((), "imagenet"),
}
# not fields of a run's identity, but what they name is, by digest
NAMED = {"teacher_checkpoint": "OTHER_TEACHER", "prior": "OTHER_PRIOR"}
# how and where a run is computed
SAME = {"batch": 2, "micro_batch": 3, "device": "auto", "shard_size": 4, "format": "imagefolder"}
SAME["kernels"] = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
ELSEWHERE = {  # test_generate.py and below
    *("out", "count", "image_format", "teacher", "classes", "student_checkpoint"),
    *("backend", "engines", "attention", "plan_only", "plan_for", "quantise"),
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, small_prior):
    root = tmp_path_factory.mktemp("places")
    other = shutil.copytree(small_prior, root / "prior")
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    return {
        "STUDENT": save_classifier(root / "student", seed=1),
        "OTHER_TEACHER": save_classifier(root / "teacher", seed=2),
        "OTHER_PRIOR": other,
    }


@pytest.fixture(scope="session")
def earlier():
    """Folders of first runs, by their arguments."""
    return {}


@pytest.fixture
def generated(call, places, earlier, tmp_path_factory, monkeypatch):
    """generated(*argv) -> the folder, made once for the same arguments.

    Networks keep their group norms: interpreted, this prior's 32 groups would take minutes. Those of a smaller one are
    in tests/engines/test_group_norm_engines.py.
    """
    monkeypatch.setattr(prepare, "set_group_norms", lambda network, name: None)

    def make(*argv):
        words = tuple(str(places.get(word, word)) for word in argv)
        if words not in earlier:
            earlier[words] = tmp_path_factory.mktemp("run") / "out"
            assert call("--out", earlier[words], *words) == 0
        return earlier[words]

    return make


def flag(name):
    return "--" + name.replace("_", "-")


def test_every_option_is_here():
    tables = [ACTS.keys(), NAMED.keys(), SAME.keys(), ELSEWHERE]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {field.name for field in fields(GenerateOptions)} == set().union(*tables)
    assert not ACTS.keys() & set(_NOT_IDENTITY) and SAME.keys() <= set(_NOT_IDENTITY) >= NAMED.keys()


@pytest.mark.parametrize("name", ACTS)
def test_it_acts_and_a_folder_remembers_it(generated, call, places, name, capsys):
    common, value = ACTS[name]
    first = generated(*common)
    second = generated(*common, flag(name), value)
    one, other = images_of(first), images_of(second)
    same = one.images.shape == other.images.shape and torch.equal(one.images, other.images)
    assert not same or one.records != other.records
    assert read_manifest(first)[0] != read_manifest(second)[0]
    capsys.readouterr()
    assert call("--out", first, *(places.get(word, word) for word in common), flag(name), value) == 2
    assert f"{name} is " in capsys.readouterr().err or name == "normalisation"


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_acts_by_its_content(generated, name, places, call, capsys):
    first, second = generated(), generated(flag(name), NAMED[name])
    assert not torch.equal(images_of(first).images, images_of(second).images)
    assert call("--out", first, flag(name), places[NAMED[name]]) == 2
    assert "holds images of other settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", SAME)
def test_how_it_is_computed_does_not_show(generated, name):
    first, second = images_of(generated()), images_of(generated(flag(name), SAME[name]))
    assert torch.equal(first.labels, second.labels)
    assert (first.images.int() - second.images.int()).abs().max() <= 2
    assert first.settings == second.settings


@pytest.mark.skipif(SAME["kernels"] != "triton", reason="the kernel is not interpreted here")
def test_kernels_compute_the_adversarial_loss_too(generated, monkeypatch):
    launches, own = [], soft_kl._launch
    monkeypatch.setattr(soft_kl, "_launch", lambda *given: launches.append(given) or own(*given))
    common = ("--student-checkpoint", "STUDENT", "--adv-weight", 2)
    plain = images_of(generated(*common, "--kernels", "torch"))
    assert not launches
    found = images_of(generated(*common, "--kernels", "triton"))
    assert launches and all(agreeing for *_, agreeing in launches)
    assert (plain.images.int() - found.images.int()).abs().max() <= 2


@pytest.mark.skipif(SAME["kernels"] != "triton", reason="the kernel is not interpreted here")
def test_it_says_how_many_layers_are_tapped(generated, call, tmp_path, capsys):
    """resnet8: the stem and the first of each block's two layers have a ReLU of their own."""
    words = "9 of 9 BatchNorm layers with their moments in a launch, 4 with their ReLU"
    for kernels, said in (("torch", None), ("triton", words)):
        result = json.loads((generated("--kernels", kernels) / "result.json").read_text())
        assert result["kernels"]["name"] == kernels and result["kernels"]["taps"] == said
    assert call("--out", tmp_path, "--kernels", "triton", "--plan-only") == 0
    assert f"  where the teacher is eager: {words}" in capsys.readouterr().err.splitlines()
    assert call("--out", tmp_path, "--kernels", "triton", "--plan-only", "--bn-weight", 0) == 0
    assert "BatchNorm layers" not in capsys.readouterr().err


@pytest.mark.parametrize("image_format", ["jpg", "npy"])
def test_image_formats(generated, image_format):
    plain, other = images_of(generated()), images_of(generated("--image-format", image_format))
    if image_format == "npy":
        assert torch.equal(plain.images, other.images)
    else:  # quality 95 of 16x16 pixels that are mostly noise
        assert (plain.images.float() - other.images.float()).abs().mean() < 8
    assert plain.records == other.records


def test_a_longer_run_begins_alike(generated):
    few, many = images_of(generated()), images_of(generated("--count", 6))
    assert torch.equal(few.images, many.images[:4]) and few.records == many.records[:4]


def test_a_bare_teacher_file_takes_its_names_from_the_options(generated, small_teacher, tmp_path):
    file = shutil.copy(small_teacher / "model.safetensors", tmp_path / "weights.safetensors")
    argv = ["--teacher", "resnet8", "--teacher-checkpoint", file, "--normalisation", "domainnet"]
    made = images_of(generated(*argv, "--classes", "ox,yak,emu", "--prompt", "a {label}"))
    assert made.class_names == ("ox", "yak", "emu") and made.records[1].prompt == "a yak"
