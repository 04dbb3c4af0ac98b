"""Every option of dfkd-generate acts: on the images or their records, or, where a run's identity leaves it out, not."""

import json
import os
import shutil

import pytest
import torch

from dfkd.config import leaves
from dfkd.config.commands import GenerateCommand
from dfkd.data import read_folder, read_manifest
from dfkd.synthesis import checks
from dfkd.training.decoder import make_decoder, save_decoder
from dfkd_engine.priors.prior import Prior
from tests.cli.small_generate import save_classifier

LOSS = """
from dataclasses import dataclass
from dfkd.synthesis.losses import GuidanceLoss


@dataclass(frozen=True)
class Entropy(GuidanceLoss):
    def __call__(self, seen):
        return -(seen.logits.softmax(1) * seen.logits.log_softmax(1)).sum(1)
"""

# option -> (what both runs take, value of the second run alone); the first has the default or what SMALL gives it
ACTS = {
    "only": ((), "one,zero"),
    "group": ((), 2),
    "seed": ((), 1),
    "dtype": ((), "bf16"),
    "teacher_dtype": ((), "bf16"),
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
    "loss": ((), "LOSS:Entropy(weight=5.0)"),
    "cutmix_every": ((), 1),
    "cutmix_alpha": (("--cutmix-every", 1), 0.1),
    "cutmix_as": (("--cutmix-every", 1), "code"),
    "cutmix_mix": (("--cutmix-every", 1), "mixup"),
    "cutmix_repair": (("--cutmix-every", 1), 2),
    "noise_edit_steps": ((), 2),
    "noise_edit_scale": (("--noise-edit-steps", 2), 2.0),
    "refine_steps": ((), 3),
    "refine_step": (("--refine-steps", 3), 0.1),
    "refine_smooth": (("--refine-steps", 3), 1.5),
    "reencode": ((), 1),
    "reencode_level": (("--reencode", 1), 1),
    "guidance_power": ((), 2),
    "tv_weight": ((), 5),
    "joint_temperature": ((), 0.3),
    "margin_discount": ((), 0.5),
    "softplus_beta": ((), 3),
    "adv_loss": (("--student-checkpoint", "STUDENT", "--adv-weight", 1), "entropy"),
    "adv_reference": (("--student-checkpoint", "STUDENT", "--adv-weight", 1, "--adv-loss", "reference"), 0.2),
    "adv_clamp": (("--student-checkpoint", "STUDENT", "--adv-weight", 30), 1e-4),
    "guide_shift": ((), 2),
    "guide_flip": ((), True),
    "guide_crop": ((), 0.5),
    "guide_colour": ((), 0.4),
    "keep_intermediates": ((), 1),
    "class_words": ((), 2),
    "step_trials": ((), 3),
    "candidates": ((), 3),
    "keep": (("--candidates", 3), "sure"),
    "keep_weight": (("--candidates", 3, "--keep", "learnable", "--student-checkpoint", "STUDENT"), 100),
    "filter_views": ((), 3),
    "filter_agreement": (("--filter-views", 3), 0.1),
    "method": ((), "noise"),
}
# no settings of a run's identity, but what they name is, by digest
NAMED = {
    "teacher_checkpoint": "OTHER_TEACHER",
    "prior": "OTHER_PRIOR",
    "guidance_decoder": "DECODER",
    "normalisation": "imagenet",
    "teacher_mean": "0.1,0.2,0.3",
    "teacher_std": "0.1,0.2,0.3",
    "teacher_input_size": 8,
}
# how and where a run is computed: one or two steps of a pixel's 256
SAME = {"batch": 2, "device": "auto", "shard_size": 8, "format": "imagefolder", "threads": 2, "backend": "eager"}
SAME |= {"attention": "sdpa", "kernels": "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"}
ELSEWHERE = {
    "tensorboard",
    "wandb",
    "out",
    "count",
    "image_format",
    "teacher",
    "classes",
    "student_checkpoint",
    "plan_only",
}
ELSEWHERE |= {"resize"}  # below
ELSEWHERE |= {"engines", "quantise"}  # test_generate_engines.py
ELSEWHERE |= {"revision", "variant", "offline", "prior_config"}  # tests/engine/test_prior_folder.py
ELSEWHERE |= {"lora", "textual_inversion"}  # test_generate_adapters.py
ELSEWHERE |= {"clients", "teaching"}  # test_clients.py


@pytest.fixture(scope="session")
def places(tmp_path_factory, small_prior):
    root = tmp_path_factory.mktemp("places")
    other = shutil.copytree(small_prior, root / "prior")
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    (root / "own.py").write_text(LOSS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_decoder(make_decoder(Prior.from_pretrained(small_prior), 8, 1), root / "decoder", torch.float32)
    return {
        "STUDENT": save_classifier(root / "student", seed=1),
        "OTHER_TEACHER": save_classifier(root / "teacher", seed=2),
        "OTHER_PRIOR": other,
        "DECODER": root / "decoder",
        "LOSS:Entropy(weight=5.0)": f"{root / 'own.py'}:Entropy(weight=5.0)",
    }


@pytest.fixture(scope="session")
def earlier():
    """Folders of first runs, by their arguments."""
    return {}


@pytest.fixture
def generated(call, places, earlier, tmp_path_factory, monkeypatch):
    """generated(*argv) -> the folder, made once for the same arguments.

    Networks keep their group norms: interpreted, this prior's 32 groups would take minutes. Those of a smaller one are
    in tests/engine/test_group_norms.py.
    """
    monkeypatch.setattr(checks, "set_group_norms", lambda network, name: None)

    def make(*argv):
        words = tuple(str(places.get(word, word)) for word in argv)
        if words not in earlier:
            earlier[words] = tmp_path_factory.mktemp("run") / "out"
            assert call("--out", earlier[words], *words) == 0
        return earlier[words]

    return make


def flag(name):
    return "--" + name.replace("_", "-")


def given(name, value):
    """The words of an option with its value; one that is on or off has none."""
    return (flag(name),) if value is True else (flag(name), value)


def test_every_option_is_here():
    tables = [ACTS.keys(), NAMED.keys(), SAME.keys(), ELSEWHERE]
    known = leaves(GenerateCommand)
    assert sum(map(len, tables)) == len(set().union(*tables)) and known.keys() == set().union(*tables)
    assert all(known[name].facts["identity"] for name in ACTS)
    assert not any(known[name].facts["identity"] for name in (*SAME, "prior"))


@pytest.mark.parametrize("name", ACTS)
def test_it_acts_and_a_folder_remembers_it(generated, call, places, name, capsys):
    common, value = ACTS[name]
    first, second = generated(*common), generated(*common, *given(name, value))
    one, other = read_folder(first), read_folder(second)
    same = one.images.shape == other.images.shape and torch.equal(one.images, other.images)
    assert not same or one.records != other.records
    assert read_manifest(first)[0].settings != read_manifest(second)[0].settings
    capsys.readouterr()
    argv = [places.get(word, word) for word in (*common, *given(name, value))]
    assert call("--out", first, *argv) == 2
    assert f"{'losses' if name == 'loss' else name} is " in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_acts_by_its_content(generated, name, places, call, capsys):
    value = places.get(NAMED[name], NAMED[name])
    first, second = generated(), generated(flag(name), value)
    one, other = read_folder(first), read_folder(second)
    assert not torch.equal(one.images, other.images) or one.records != other.records
    assert call("--out", first, flag(name), value) == 2
    assert "holds images of other settings" in capsys.readouterr().err


def test_how_the_teacher_is_shown_larger_images_acts(generated):
    """Those of 16 pixels, to one of 8; to one of 16 every way is the same."""
    smaller, published = ("--teacher-input-size", 8), ("--resize", "published")
    assert not torch.equal(*(read_folder(generated(*smaller, *more)).images for more in ((), published)))
    assert torch.equal(*(read_folder(generated(*more)).images for more in ((), published)))


@pytest.mark.parametrize("name", SAME)
def test_how_it_is_computed_does_not_show(generated, name):
    common = ("--steps", 1) if name == "kernels" else ()  # interpreted kernels are slow
    first, second = read_folder(generated(*common)), read_folder(generated(*common, flag(name), SAME[name]))
    assert torch.equal(first.labels, second.labels) and first.settings == second.settings
    assert (first.images.int() - second.images.int()).abs().max() <= 2


@pytest.mark.parametrize("image_format", ["jpg", "npy"])
def test_image_formats(generated, image_format):
    plain, other = read_folder(generated()), read_folder(generated("--image-format", image_format))
    if image_format == "npy":
        assert torch.equal(plain.images, other.images)
    else:  # quality 95 of 16x16 pixels that are mostly noise
        assert 0 < (plain.images.float() - other.images.float()).abs().mean() < 8
    assert plain.records == other.records


def test_a_longer_run_begins_alike(generated):
    few, many = (read_folder(generated("--batch", 4, *more)) for more in ((), ("--count", 6)))
    assert torch.equal(few.images, many.images[:4]) and few.records == many.records[:4]


def test_a_bare_teacher_file_takes_its_names_from_the_options(generated, small_teacher, tmp_path):
    file = shutil.copy(small_teacher / "model.safetensors", tmp_path / "weights.safetensors")
    argv = ["--teacher", "resnet8", "--teacher-checkpoint", file, "--normalisation", "domainnet"]
    made = read_folder(generated(*argv, "--classes", "ox,yak,emu", "--prompt", "a {label}"))
    assert made.class_names == ("ox", "yak", "emu") and made.records[1].prompt == "a yak"
