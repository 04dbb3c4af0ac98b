"""Engine sets as build/engines.toml describes them, and what is wrong with one."""

from pathlib import Path

import pytest

from dfkd.compiled.sets import narrowed, read_set, set_of
from dfkd.errors import UsageError
from dfkd.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
TOML = """
[mine]
backends = ["onnxruntime", "inductor"]
networks = ["decode", "unet"]

[mine.generate]
teacher-checkpoint = "t"
steps = 7
classes = ["a", "b"]

[bare]

[backend]
backends = ["tvm"]

[network]
networks = ["decode", "image_moments"]

[key]
backend = "inductor"

[option]
generate = { stepz = 4 }

[unet]
generate = { gradient = "unet" }
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "engines.toml"
    path.write_text(TOML)
    return path


def test_a_set(file):
    found = read_set(file, "mine")
    assert (found.name, found.networks, found.backends) == ("mine", ("decode", "unet"), ("onnxruntime", "inductor"))
    assert found.options.steps == 7 and found.options.classes == ("a", "b")
    assert found.options.teacher_checkpoint == Path("t")
    assert read_set(file, "mine", ["--steps", "9"]).options.steps == 9  # the command line overrides it


def test_what_a_set_leaves_out(file):
    found = read_set(file, "bare")
    assert found.networks == ("unet", "decode", "gradient") and len(found.backends) == 1
    assert set_of(["--guidance-step", "0"]).networks == ("unet", "decode")


def test_narrowed(file):
    found = narrowed(read_set(file, "mine"), ("unet",), "inductor")
    assert (found.networks, found.backends) == (("unet",), ("inductor",))
    assert narrowed(found, (), "") == found
    with pytest.raises(UsageError, match="--only names 'gradient': this set has decode, unet"):
        narrowed(read_set(file, "mine"), ("unet", "gradient"), "")


@pytest.mark.parametrize(
    "name, message",
    [
        ("yours", "has no set 'yours': it has mine, bare, .*choose one of them with --set"),
        ("backend", "the set backend names the backend 'tvm': known are inductor, onnxruntime, tensorrt"),
        ("network", "the set network names the network 'image_moments': known are unet, decode, gradient"),
        ("key", r"\[key\] has an unknown key 'backend': known are backends, networks, targets, generate"),
        ("option", "unknown argument --stepz: did you mean .*--steps"),
        ("unet", "--gradient unet uses no engines.*--gradient latent"),
    ],
)
def test_refused(file, name, message):
    with pytest.raises(UsageError, match=message):
        read_set(file, name)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.toml: No such file.*--sets"):
        read_set(tmp_path / "nowhere.toml", "demo")
    (tmp_path / "x.toml").write_text("[demo\n")
    with pytest.raises(UsageError, match=r"x\.toml is not TOML"):
        read_set(tmp_path / "x.toml", "demo")


@pytest.mark.parametrize("name", ["demo", "sd15-256", "sd15-512"])
def test_the_sets_of_the_project(name):
    found = read_set(ROOT / "build/engines.toml", name, ["--teacher-checkpoint", "t"])
    assert {"unet", "decode"} < set(found.networks) and found.backends
    if name == "demo":
        for option, value in PRESETS["demo"].overrides("dfkd-generate").items():
            assert getattr(found.options, option.replace("-", "_")) == value
    else:
        assert found.options.size == int(name.removeprefix("sd15-")) and found.options.dtype == "fp16"
