"""An 8-bit UNet from the build to a run's folder: asked for it is there or refused, and otherwise never taken."""

import json
import shlex
from dataclasses import replace

import pytest

from dfkd.cli import engines, generate
from dfkd.compiled.choose import choose
from dfkd.compiled.requests import requests, takes
from dfkd.errors import UsageError
from dfkd_engine.parity import TOLERANCE
from dfkd_engine.spec import cpu_architecture
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import status_of
from tests.compiled.small_engines import BACKEND, NEEDS_IT, measured, options_of, recipes, set_facts, with_own_store

NARROW = ("--quantise", "int8")


@pytest.fixture(scope="module")
def quantised(place, tmp_path_factory):
    """The place with an int8 UNet beside its engines."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt (the extra quantise)")
    own = with_own_store(place, tmp_path_factory.mktemp("quantised"))
    words = ("build", "--only", "unet", "--engines", own.store, "--", *own.words(*NARROW))
    assert status_of(engines.main, *words) == 0
    return own


def engine_of(place, *more):
    """The manifest that the UNet's request leads to."""
    options = options_of(place.prior, place.teacher, *more)
    return EngineStore(place.store).find(recipes(options, BACKEND, place.store)["unet"].recipe)


def chosen(place, *more, before=None):
    options = options_of(place.prior, place.teacher, "--engines", place.store, *more)
    choices = choose(options, EngineStore(place.store), generate.build_command(options), before)
    return {choice.network: choice for choice in choices}


def generated(place, out, *more):
    words = ("--out", out, "--count", 6, "--engines", place.store, *place.words(*more))
    return status_of(generate.main, *words)


@NEEDS_IT
def test_what_is_known_of_it(quantised):
    manifest, wide = engine_of(quantised, *NARROW), engine_of(quantised)
    assert manifest.key != wide.key and dict(manifest.spec.flags)["quantise"] == "int8"
    assert manifest.spec.weights != wide.spec.weights and manifest.spec.graph != wide.spec.graph
    error = manifest.facts["parity"]["relative"]
    assert 1e-3 < error < TOLERANCE["forward", "int8"].relative
    assert manifest.facts["parity_unquantised"]["relative"] < 1e-5
    assert manifest.facts["parity_with_simulation"]["relative"] < error
    assert "parity_unquantised" not in wide.facts


@NEEDS_IT
def test_it_is_current_the_second_time_without_networks(quantised, monkeypatch):
    monkeypatch.setattr("dfkd.compiled.sources.load_sources", None)
    words = ("build", "--only", "unet", "--engines", quantised.store, "--", *quantised.words(*NARROW))
    assert status_of(engines.main, *words) == 0


@NEEDS_IT
def test_auto_takes_it_only_where_it_is_asked_for(quantised, tmp_path):
    own = with_own_store(quantised, tmp_path)
    narrow, wide = engine_of(own, *NARROW), engine_of(own)
    slow = replace(narrow, facts={**narrow.facts, "milliseconds": measured(9.0, 1.0)})
    (own.store / narrow.key / "manifest.json").write_text(slow.to_text())
    choices = chosen(own, *NARROW)
    assert choices["unet"].key == narrow.key and choices["unet"].why == "--quantise int8"
    quick = replace(narrow, facts={**narrow.facts, "milliseconds": measured(0.1, 9.0), "rows_exact": True})
    (own.store / narrow.key / "manifest.json").write_text(quick.to_text())
    set_facts_of_wide(own, wide)
    assert chosen(own)["unet"].key is None
    assert chosen(own, "--backend", BACKEND)["unet"].key == wide.key
    assert chosen(own, "--backend", BACKEND, *NARROW)["unet"].key == narrow.key


def set_facts_of_wide(place, wide):
    slow = replace(wide, facts={**wide.facts, "milliseconds": measured(9.0, 1.0)})
    (place.store / wide.key / "manifest.json").write_text(slow.to_text())


@NEEDS_IT
def test_the_other_networks_choose_as_ever(quantised, tmp_path):
    own = with_own_store(quantised, tmp_path)
    set_facts(own.store, "decode", milliseconds=measured(1.0, 9.0), rows_exact=True)
    set_facts(own.store, "gradient", milliseconds=measured(9.0, 1.0))
    with_it, without = chosen(own, *NARROW), chosen(own)
    assert {n: c.key for n, c in with_it.items() if n != "unet"} == {
        n: c.key for n, c in without.items() if n != "unet"
    }
    assert with_it["decode"].backend == BACKEND and with_it["gradient"].backend == "eager"


@pytest.mark.parametrize("backend", ["auto", BACKEND])
def test_without_the_engine_it_is_refused_with_the_command(place, backend):
    with pytest.raises(UsageError) as caught:
        chosen(place, "--backend", backend, "--quantise", "fp8")
    assert ("fp8 engine of the UNet" if backend == "auto" else f"no {BACKEND} engine") in caught.value.what
    command = shlex.split(caught.value.todo.removeprefix("build it: "))
    split = command.index("--")
    assert command[:2] == ["dfkd-engines", "build"] and command[split:].count("fp8") == 1
    assert ("--only" in command[:split]) is (backend == "auto")
    assert engines._chosen(engines.BuildOptions(backend=""), command[split + 1 :]).backends == (BACKEND,)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_backend_without_eight_bits_is_refused(place, backend, capsys):
    assert generated(place, place.store / "none", "--backend", backend, *NARROW) == 2
    said = capsys.readouterr().err
    assert f"--quantise int8 cannot run on --backend {backend}" in said and f"engines of {BACKEND}" in said
    assert not (place.store / "none").exists()


def test_a_gradient_through_the_unet_is_refused(place, capsys):
    assert generated(place, place.store / "none", "--gradient", "unet", *NARROW) == 2
    assert "--quantise int8 needs --gradient latent" in capsys.readouterr().err


def test_a_build_for_a_backend_without_eight_bits_is_refused(place, capsys):
    words = ("build", "--backend", "inductor", "--engines", place.store, "--", *place.words(*NARROW))
    assert status_of(engines.main, *words) == 2
    said = capsys.readouterr().err
    assert "inductor takes no int8 unet" in said and f"use --backend {BACKEND}" in said


def test_only_the_unet_is_another(place):
    options = options_of(place.prior, place.teacher, *NARROW)
    plain = recipes(options_of(place.prior, place.teacher), BACKEND, place.store)
    narrow = recipes(options, BACKEND, place.store)
    assert {name for name in narrow if narrow[name].recipe != plain[name].recipe} == {"unet"}
    assert str(narrow["unet"]).startswith("unet int8 in") and narrow["unet"].quantised == "int8"
    assert not takes(options, "unet", "inductor") and takes(options, "decode", "inductor")


@pytest.mark.parametrize(
    "more",
    [("--quantise", "fp8"), ("--prompt", "another {label}"), ("--steps", 3), ("--sampler", "ddpm"), ("--only", "one")],
)
def test_what_a_calibration_follows_from_is_in_the_recipe(place, more):
    one = recipes(options_of(place.prior, place.teacher, *NARROW), BACKEND, place.store)["unet"].recipe
    other = recipes(options_of(place.prior, place.teacher, *NARROW, *more), BACKEND, place.store)["unet"].recipe
    assert one != other
    if more[0] != "--quantise":  # and a UNet in full precision follows from none of it
        plain = recipes(options_of(place.prior, place.teacher), BACKEND, place.store)["unet"].recipe
        assert plain == recipes(options_of(place.prior, place.teacher, *more), BACKEND, place.store)["unet"].recipe


def test_prompts_that_name_classes_need_a_teacher(place, tmp_path):
    from dfkd.compiled.digests import FileDigests

    options = replace(options_of(place.prior, None, *NARROW, "--prompt", "a {label}"), guidance_step=0.0)
    with pytest.raises(UsageError, match=r"knows no classes.*--classes"):
        requests(options, BACKEND, cpu_architecture(), FileDigests(tmp_path / "digests"))
    named = replace(options, classes=("a", "b"))
    assert requests(named, BACKEND, cpu_architecture(), FileDigests(tmp_path / "digests"))


@NEEDS_IT
def test_a_run_from_build_to_images(quantised, tmp_path, capsys):
    """Images by the 8-bit engine; the folder keeps to it, and one of another UNet is not continued with it."""
    assert generated(quantised, tmp_path / "narrow", *NARROW) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["backends"]["unet"] == {"backend": BACKEND, "why": "--quantise int8"}
    manifest = json.loads((tmp_path / "narrow" / "manifest.json").read_text())
    assert engine_of(quantised, *NARROW).key in json.dumps(manifest)
    assert generated(quantised, tmp_path / "narrow", *NARROW) == 0  # again: nothing to do, and nothing against it
    assert generated(quantised, tmp_path / "narrow") == 2
    assert "cannot be continued" in capsys.readouterr().err
    assert generated(quantised, tmp_path / "wide", "--backend", "eager") == 0
    assert generated(quantised, tmp_path / "wide", *NARROW) == 2
    assert "engines" in capsys.readouterr().err
