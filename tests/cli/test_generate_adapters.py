"""dfkd-generate with LoRA weights and words of textual inversion: they act, and enter what a run is."""

import re

import pytest
from diffusers import StableDiffusionPipeline

from tests.adapter_files import save_lora, save_token
from tests.cli.small_generate import shards_of


@pytest.fixture
def run(call, tiny_prior, tmp_path):
    """run(*options) -> the exit status on the tiny Stable Diffusion; images go to tmp_path/out unless told."""
    return lambda *options: call(
        "--prior", tiny_prior("sd1"), "--backend", "eager", "--out", tmp_path / "out", *options
    )


def test_lora_weights_act_and_are_known_again(run, tiny_prior, tmp_path, capsys):
    lora = save_lora(tmp_path / "lora", tiny_prior("sd1"), StableDiffusionPipeline)
    assert run() == 0 and run("--lora", lora, "--out", tmp_path / "other") == 0
    assert shards_of(tmp_path / "out") != shards_of(tmp_path / "other")
    assert run("--lora", f"{lora}:1", "--out", tmp_path / "half") == 0
    assert run("--lora", f"{lora}:0.5", "--out", tmp_path / "half") == 2
    capsys.readouterr()
    assert run("--lora", lora) == 2
    assert "lora" in capsys.readouterr().err
    assert run("--lora", f"{lora}:much") == 2
    assert "its scale 'much' is no number" in capsys.readouterr().err


def test_a_word_that_was_added(run, tmp_path, capsys):
    token = save_token(tmp_path / "toy.safetensors", rows=2)
    plain, given = ("--prompt", "a {label} <toy>"), ("--textual-inversion", token)
    assert run(*plain) == 0 and run(*plain, *given, "--out", tmp_path / "other") == 0
    assert shards_of(tmp_path / "out") != shards_of(tmp_path / "other")
    assert "textual inversion" not in capsys.readouterr().err
    assert run(*plain, *given) == 2
    assert "textual_inversion" in capsys.readouterr().err
    assert run(*given, "--out", tmp_path / "unused") == 0
    assert re.search("no prompt has <toy>, which textual inversion added", capsys.readouterr().err)


def test_the_command_that_builds_engines_names_them(run, tiny_prior, tmp_path, capsys):
    lora, token = save_lora(tmp_path / "lora", tiny_prior("sd1"), StableDiffusionPipeline), tmp_path / "toy.safetensors"
    save_token(token)
    given = ("--lora", f"{lora}:0.5,{lora}", "--textual-inversion", token, "--prompt", "{label} <toy>")
    assert run(*given, "--backend", "onnxruntime", "--engines", tmp_path / "engines") == 2
    error = capsys.readouterr().err
    assert f"--lora {lora}:0.5,{lora} --textual-inversion {token}" in error
