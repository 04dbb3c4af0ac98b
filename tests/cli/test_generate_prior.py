"""dfkd-generate and its prior's files: a folder of images takes no other prior, and prompts are read whole."""

import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dfkd.data import MANIFEST, read_folder
from dfkd_engine.priors.prior import Prior
from tests.cli.small_generate import last_line, shards_of
from tests.single_file import write_single_file


@pytest.fixture
def fresh(call, cached_prior, monkeypatch):
    """`call` whose prior is loaded anew every time, as the command does."""
    monkeypatch.setattr(Prior, "from_pretrained", cached_prior.__wrapped__)
    return call


def edit(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def add_to(name):
    def change(path):
        weights = load_file(path)
        weights[name] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})

    return change


def append(text):
    return lambda path: path.write_text(path.read_text() + text)


DECIDING = {
    "unet/config.json": ("unet", edit(norm_eps=1e-4)),
    "unet/diffusion_pytorch_model.safetensors": ("unet", add_to("conv_out.bias")),
    "vae/config.json": ("vae", edit(scaling_factor=0.9)),
    "vae/diffusion_pytorch_model.safetensors": ("vae", add_to("decoder.conv_out.bias")),
    "text_encoder/config.json": ("text_encoder", edit(hidden_act="gelu")),
    "text_encoder/model.safetensors": ("text_encoder", add_to("final_layer_norm.bias")),
    "tokenizer/tokenizer_config.json": ("tokenizer", edit(model_max_length=20)),
    "tokenizer/tokenizer.json": ("tokenizer", append("\n")),
    "tokenizer/vocab.json": ("tokenizer", append("\n")),
    "tokenizer/merges.txt": ("tokenizer", append("t h\n")),
    "scheduler/scheduler_config.json": ("scheduler", edit(beta_end=0.013)),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return tmp_path_factory.mktemp("begun")


def test_every_file_of_the_prior_that_decides_an_image_is_of_the_runs_identity(
    fresh, small_prior, begun, capsys, monkeypatch
):
    prior, out = begun / "prior", begun / "out"
    shutil.copytree(small_prior, prior)
    assert fresh("--out", out, "--prior", prior) == 0
    for file, (part, change) in DECIDING.items():
        before = (prior / file).read_bytes()
        change(prior / file)
        assert fresh("--out", out, "--prior", prior) == 2, file
        assert f"{part} is " in capsys.readouterr().err.splitlines()[-1], file
        (prior / file).write_bytes(before)
    files = {path.relative_to(prior).as_posix() for path in prior.rglob("*") if path.is_file()}
    assert files - DECIDING.keys() == {"model_index.json"}  # from which nothing follows in this family
    shards = shards_of(out)
    edit(_name_or_path="elsewhere")(prior / "model_index.json")
    assert fresh("--out", out, "--prior", prior) == 0 and last_line(capsys.readouterr().out)["images_written"] == 0
    assert shards_of(out) == shards
    (prior / "dfkd.json").write_text('{"prompt": "the {label}"}')
    assert fresh("--out", out, "--prior", prior) == 2
    assert "prompt is a photo of a {label} there and the {label} here" in capsys.readouterr().err


def test_a_prompt_whose_labels_the_prior_does_not_read_is_refused(call, tmp_path, capsys):
    long = "a " * 80 + "{label}"
    assert call("--out", tmp_path / "out", "--prompt", long) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "are one to the prior: its tokenizer cuts off" in error and not (tmp_path / "out" / MANIFEST).exists()
    assert call("--out", tmp_path / "out", "--negative-prompt", "a " * 80 + "end") == 0
    assert "warning: the prior does not read 'a a a a a end', the end of 'a a" in capsys.readouterr().err


def test_files_are_chosen_by_flags_that_act(fresh, small_prior, tmp_path, capsys):
    prior = shutil.copytree(small_prior, tmp_path / "prior")
    for path in prior.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert fresh("--out", tmp_path / "out", "--prior", prior, "--variant", "fp16") == 0
    assert fresh("--out", tmp_path / "out", "--prior", prior, "--variant", "bf16") == 2
    assert "no part has the variant 'bf16'; it has fp16" in capsys.readouterr().err
    assert fresh("--out", tmp_path / "x", "--prior", prior, "--revision", "v1") == 2
    assert "revision 'v1': " in capsys.readouterr().err
    assert fresh("--out", tmp_path / "x", "--prior", "owner/absent", "--offline") == 2
    assert "owner/absent: it is not in the local cache, and nothing may be fetched" in capsys.readouterr().err


def test_a_checkpoint_in_one_file_draws_the_images_of_its_pipeline(fresh, small_prior, tmp_path, capsys):
    file = write_single_file(StableDiffusionPipeline.from_pretrained(small_prior), tmp_path / "model.safetensors")
    configs = shutil.copytree(small_prior, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    named = ("--prior", file, "--prior-config", configs)
    assert fresh("--out", tmp_path / "folder", "--prior", small_prior) == 0
    assert fresh("--out", tmp_path / "file", *named) == 0
    assert (read_folder(tmp_path / "folder").images == read_folder(tmp_path / "file").images).all()
    assert fresh("--out", tmp_path / "folder", *named) == 2  # other files: it is told what differs
    assert "unet is " in capsys.readouterr().err
    assert fresh("--out", tmp_path / "x", *named, "--backend", "inductor") == 2
    assert f"--prior {file} --prior-config {configs}" in capsys.readouterr().err


def test_a_prior_that_states_no_size_is_told_one(fresh, small_prior, tmp_path, capsys):
    prior = shutil.copytree(small_prior, tmp_path / "prior")
    edit(sample_size=None)(prior / "unet/config.json")
    assert fresh("--out", tmp_path / "out", "--prior", prior) == 2
    assert "the prior's config states no sample_size: images need one. give --size" in capsys.readouterr().err
    assert fresh("--out", tmp_path / "out", "--prior", prior, "--size", 16) == 0
    assert fresh("--out", tmp_path / "same", "--prior", small_prior) == 0
    assert (read_folder(tmp_path / "out").images == read_folder(tmp_path / "same").images).all()
