"""dfkd-generate --class-words: words are learned, kept, taken up again, and are what the prompts say."""

import json

import pytest
import safetensors.torch
import torch

from dfkd.config import GenerateConfig
from dfkd.data import read_folder
from dfkd.errors import UsageError
from dfkd.synthesis import class_words
from dfkd.synthesis.class_words import word_of
from dfkd.synthesis.pipeline import GuidedPipeline
from dfkd.teachers import Classifier
from dfkd_engine.priors.prior import Prior
from tests.cli.small_generate import shards_of

WORDS = ("--class-words", 4, "--backend", "eager", "--shard-size", 4)


def words_of(out):
    return {file.name: file.read_bytes() for file in sorted((out / "class-words").iterdir())}


@pytest.fixture
def pipe(small_prior, small_teacher):
    """A pipeline on a prior of its own, which words are added to."""
    config = GenerateConfig.of(class_words=4, steps=3, group=4, device="cpu", backend="eager")
    return GuidedPipeline(Prior.from_pretrained(small_prior), Classifier.from_pretrained(small_teacher), config)


def test_words_stand_for_the_classes_and_a_run_that_goes_on_takes_them_up(call, tmp_path, capfd):
    out = tmp_path / "out"
    assert call("--out", out, "--count", 8, *WORDS) == 0
    assert "class words: 3 learned in 4 steps" in capfd.readouterr().err
    assert [word_of(record.label) in record.prompt for record in read_folder(out).records] == [True] * 8
    run = json.loads((out / "manifest.json").read_text())["run"]
    assert len(run["class_word_losses"]) == 2 and run["prepared_seconds"] > 0
    shards, words = shards_of(out), words_of(out)
    assert list(words) == ["class-0.safetensors", "class-1.safetensors", "class-2.safetensors"]
    (out / "shard-00001.tar").unlink()
    assert call("--out", out, "--count", 8, *WORDS) == 0
    assert "class words" not in capfd.readouterr().err
    assert (shards_of(out), words_of(out)) == (shards, words)
    assert call("--out", tmp_path / "again", "--count", 8, *WORDS) == 0
    assert (shards_of(tmp_path / "again"), words_of(tmp_path / "again")) == (shards, words)
    capfd.readouterr()
    (out / "class-words/class-1.safetensors").unlink()
    assert call("--out", out, "--count", 8, *WORDS) == 2
    assert "its images were made with words that are gone or changed" in capfd.readouterr().err


def test_another_run_takes_a_word_by_textual_inversion(call, tmp_path):
    assert call("--out", tmp_path / "a", *WORDS) == 0
    stored = safetensors.torch.load_file(tmp_path / "a/class-words/class-1.safetensors")
    assert list(stored) == ["<class-1>"] and stored["<class-1>"].dim() == 1


def test_the_gradient_of_the_words_is_their_difference_quotient(pipe, tmp_path, monkeypatch):
    """Along itself, on a trajectory that is held."""
    seen, own = [], class_words._loss

    def kept(pipe, words, seed, step):
        loss = own(pipe, words, seed, step)
        (gradient,) = torch.autograd.grad(loss, words, retain_graph=True)
        seen.append((words.detach().clone(), gradient))
        return loss

    monkeypatch.setattr(class_words, "_loss", kept)
    pipe.prepare(tmp_path, {}, 3, lambda line: None)
    words, gradient = seen[0]
    length = float(gradient.norm())

    def loss_at(distance):
        class_words._put(pipe, words)  # of the trajectory
        return float(own(pipe, (words + distance * gradient / length).requires_grad_(), 3, 0).detach())

    # float32: a loss of about 1 is known to 1e-7, and it changes by some 1e-6
    assert length > 0 and (loss_at(0.02) - loss_at(-0.02)) / 0.04 == pytest.approx(length, rel=0.2)


def test_what_a_prior_cannot_do_is_refused(call, tmp_path, tiny_prior, small_teacher, capfd):
    assert call("--out", tmp_path, *WORDS, "--prompt", "a photo") == 2
    assert "names no {label}" in capfd.readouterr().err
    assert call("--out", tmp_path, *WORDS, "--plan-only") == 2
    assert "--plan-only with --class-words 4: its seconds are not known" in capfd.readouterr().err
    config = GenerateConfig.of(class_words=4, steps=3, group=4, device="cpu", backend="eager")
    teacher = Classifier.from_pretrained(small_teacher)
    with pytest.raises(UsageError, match="2 text encoders, and a word is learned for one"):
        GuidedPipeline(Prior.from_pretrained(tiny_prior("sdxl")), teacher, config)
