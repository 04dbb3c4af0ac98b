"""Which backend runs which network: by measurement, by name, or as a folder was begun; and what is refused."""

import shlex
from dataclasses import replace
from typing import Any

import pytest

from dfkd.cli import engines, generate
from dfkd.cli.prepare import prepare
from dfkd.compiled.choose import Choice, apply, choose, in_words
from dfkd.compiled.guidance import CompiledGuidance, CompiledPrior
from dfkd.compiled.requests import DIGESTS
from dfkd.compiled.sources import sources_of
from dfkd.errors import UsageError
from dfkd_engine.errors import EngineError
from dfkd_engine.spec import pairs
from dfkd_engine.store import EngineStore
from tests.cli.small_generate import status_of
from tests.compiled.small_engines import (
    BACKEND,
    NEEDS_IT,
    flip_a_byte,
    key_of,
    measured,
    nudge,
    options_of,
    recipes,
    set_facts,
)

NETWORKS = ("unet", "decode", "gradient")


def chosen(place, *more, before=None):
    options = options_of(place.prior, place.teacher, "--engines", place.store, *more)
    return choose(options, EngineStore(place.store), generate.build_command(options), before)


def by_network(choices):
    return {choice.network: (choice.backend, choice.key) for choice in choices}


def test_without_engines_it_is_eager(place, tmp_path):
    choices = chosen(place._replace(store=tmp_path / "none"))
    assert by_network(choices) == dict.fromkeys(NETWORKS, ("eager", None))
    assert in_words(choices) == ["unet, decode, gradient: eager (no engine is built: dfkd-engines build)"]
    assert not (tmp_path / "none").exists()


@NEEDS_IT
def test_auto_takes_what_was_measured_quicker(own):
    set_facts(own.store, "unet", milliseconds=measured(2.0, 3.0))
    set_facts(own.store, "decode", milliseconds=measured(3.0, 2.0))
    set_facts(own.store, "gradient", milliseconds=measured(2.5, 2.5))
    choices = chosen(own)
    assert by_network(choices) == {
        "unet": (BACKEND, key_of(own.store, "unet")), "decode": ("eager", None), "gradient": ("eager", None)
    }  # fmt: skip
    when = "6 rows, 1 threads, when it was built"
    assert in_words(choices) == [
        f"unet: {BACKEND} (2.0 ms a call, eager 3.0: {when})",
        f"decode: eager (2.0 ms a call, {BACKEND} 3.0: {when})",
        f"gradient: eager (2.5 ms a call, {BACKEND} 2.5: {when})",
    ]


@NEEDS_IT
@pytest.mark.parametrize("engine, backend", [(1.89, BACKEND), (1.9, "eager"), (2.0, "eager")])
def test_auto_wants_a_margin_of_five_percent(own, engine, backend):
    set_facts(own.store, "decode", milliseconds=measured(engine, 2.0))
    assert by_network(chosen(own))["decode"][0] == backend


@NEEDS_IT
def test_auto_leaves_an_engine_whose_rows_depend_on_the_call(own):
    set_facts(own.store, "unet", milliseconds=measured(1.0, 9.0), rows_exact=False)
    set_facts(own.store, "decode", milliseconds=measured(1.0, 9.0), rows_exact=True)
    choices = {choice.network: choice for choice in chosen(own)}
    assert choices["unet"].backend == "eager" and "--batch" in choices["unet"].why
    assert choices["decode"].backend == BACKEND
    assert by_network(chosen(own, "--backend", BACKEND))["unet"][0] == BACKEND


@NEEDS_IT
@pytest.mark.parametrize("batch", [1, 4, 512])
def test_auto_chooses_alike_for_every_batch(own, batch):
    for name in NETWORKS:
        set_facts(own.store, name, milliseconds=measured(1.0, 9.0))
    assert by_network(chosen(own, "--batch", batch)) == {n: (BACKEND, key_of(own.store, n)) for n in NETWORKS}


@NEEDS_IT
@pytest.mark.parametrize("inductor, winner", [(1.5, "inductor"), (2.5, BACKEND), (9.0, BACKEND)])
def test_auto_takes_the_quickest_of_several(own, inductor, winner):
    """An engine of the other backend beside it, of the same network."""
    store = EngineStore(own.store)
    set_facts(own.store, "decode", milliseconds=measured(2.0, 3.0))
    theirs = store.get(key_of(own.store, "decode"))
    request = recipes(options_of(own.prior, own.teacher), "inductor", own.store)["decode"]

    def part(prefix):
        return pairs({k.removeprefix(prefix): v for k, v in request.recipe.items() if k.startswith(prefix)})

    spec = replace(theirs.spec, backend="inductor", versions=part("versions."), flags=part("flags."))

    def make(folder) -> dict[str, Any]:
        (folder / "engine.pt2").write_bytes(b"nothing loads it here")
        return {**theirs.facts, "milliseconds": measured(inductor, 3.0)}

    store.build(spec, request.recipe, make)
    choices = {choice.network: choice for choice in chosen(own)}
    assert choices["decode"].backend == winner
    named = {choice.network: choice for choice in chosen(own, "--backend", BACKEND)}
    assert named["decode"].backend == BACKEND  # a name is a name


@NEEDS_IT
def test_a_named_backend_is_taken_however_quick(own):
    for network in NETWORKS:
        set_facts(own.store, network, milliseconds=measured(9.0, 1.0))
    choices = chosen(own, "--backend", BACKEND)
    assert by_network(choices) == {name: (BACKEND, key_of(own.store, name)) for name in NETWORKS}
    assert {choice.why for choice in choices} == {f"--backend {BACKEND}"}
    assert by_network(chosen(own, "--backend", "eager")) == dict.fromkeys(NETWORKS, ("eager", None))


@NEEDS_IT
def test_options_that_no_engine_depends_on(place):
    choices = chosen(place, "--backend", BACKEND, "--steps", 9, "--seed", 4, "--cutmix-every", 1)
    assert all(choice.key for choice in choices)


def test_a_gradient_through_the_unet_is_eager(place, tmp_path):
    empty = place._replace(store=tmp_path)
    assert chosen(empty, "--gradient", "unet") == ()
    for backend in ("inductor", "onnxruntime"):
        with pytest.raises(UsageError, match=f"--gradient unet cannot run on --backend {backend}.*no backward.*latent"):
            chosen(empty, "--gradient", "unet", "--backend", backend)


@NEEDS_IT
def test_a_missing_engine_names_the_command_that_builds_it(own, copied, capsys):
    """The nearest engine's difference is told, and the command, taken as it stands, mends the want."""
    changed = own._replace(prior=copied(own.prior))
    nudge(next((changed.prior / "vae").glob("*.safetensors")))
    more = ("--backend", BACKEND, "--guidance-step", 0, "--prompt", "a photo, 'of' \"an\" {label} $HOME", "--seed", 5)
    with pytest.raises(UsageError) as caught:
        chosen(changed, *more)
    text = str(caught.value)
    assert f"there is no {BACKEND} engine in {own.store} for decode: decode: prior.vae was " in text
    words = shlex.split(text.partition("build it: ")[2].removesuffix("."))
    assert words[:2] == ["dfkd-engines", "build"]
    capsys.readouterr()
    assert status_of(engines.main, *words[1:]) == 0
    said = capsys.readouterr().err
    assert "2 engines of these options, 1 current" in said and f"[1/1] decode in {BACKEND}, up to 6 rows: prior" in said
    assert [choice.backend for choice in chosen(changed, *more)] == [BACKEND] * 2


@NEEDS_IT
def test_several_missing_engines_are_all_named(place, tmp_path):
    empty = place._replace(store=tmp_path / "none")
    with pytest.raises(UsageError, match="for unet, decode, gradient: unet: it was not built yet"):
        chosen(empty, "--backend", BACKEND)


@NEEDS_IT
def test_a_damaged_manifest_is_no_engine(own):
    (own.store / key_of(own.store, "decode") / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"for decode: decode: it is damaged: manifest.json holds no manifest"):
        chosen(own, "--backend", BACKEND)
    assert by_network(chosen(own))["decode"] == ("eager", None)


class TestContinued:
    """A folder goes on as it was begun."""

    @NEEDS_IT
    def test_with_the_same_engines(self, own):
        keys = {name: key_of(own.store, name) for name in NETWORKS}
        for name in NETWORKS:
            set_facts(own.store, name, milliseconds=measured(9.0, 1.0))
        assert set(by_network(chosen(own)).values()) == {("eager", None)}
        choices = chosen(own, before=keys)
        assert by_network(choices) == {name: (BACKEND, key) for name, key in keys.items()}
        assert {choice.why for choice in choices} == {"the folder was begun with it"}

    @NEEDS_IT
    @pytest.mark.parametrize("before", [{}, {"unet": "KEY"}])
    def test_without_those_that_came_later(self, own, before):
        for name in NETWORKS:
            set_facts(own.store, name, milliseconds=measured(1.0, 9.0))
        before = {name: key_of(own.store, name) for name in before}
        expected = {name: (BACKEND, before[name]) if name in before else ("eager", None) for name in NETWORKS}
        assert by_network(chosen(own, before=before)) == expected

    @NEEDS_IT
    def test_not_when_they_are_gone(self, own):
        keys = {name: key_of(own.store, name) for name in NETWORKS}
        EngineStore(own.store).prune({keys["unet"], keys["decode"]})
        with pytest.raises(UsageError) as caught:
            chosen(own, before=keys)
        text = str(caught.value)
        assert "this folder cannot be continued" in text and f"the gradient engine {keys['gradient']}" in text
        assert "do not lead to now" in text and "dfkd-engines build --engines" in text and "--out" in text


class TestApply:
    @pytest.fixture
    def synthesis(self, place):
        return prepare(options_of(place.prior, place.teacher))

    def test_eager_leaves_it_alone(self, synthesis, tmp_path):
        choices = tuple(Choice(name, "eager", None, "") for name in NETWORKS)
        assert apply(synthesis, sources_of(synthesis), choices, EngineStore(tmp_path)) is synthesis

    @NEEDS_IT
    def test_engines_take_the_networks_places(self, own, synthesis):
        choices = chosen(own, "--backend", BACKEND)
        applied = apply(synthesis, sources_of(synthesis), choices, EngineStore(own.store))
        assert isinstance(applied.prior, CompiledPrior) and isinstance(applied.guidance, CompiledGuidance)
        assert applied.prior.engines.keys() == applied.guidance.engines.keys() == set(NETWORKS)
        images, records = applied.sample(0, 6)
        expected, others = synthesis.sample(0, 6)
        assert (images.int() - expected.int()).abs().max() <= 2 and images.float().std() > 2
        assert [record.label for record in records] == [record.label for record in others]

    @NEEDS_IT
    def test_a_damaged_payload_is_refused(self, own, synthesis):
        choices = chosen(own, "--backend", BACKEND)
        flip_a_byte(own.store, "gradient")
        with pytest.raises(EngineError, match=r"the engine gradient .* is damaged: .* altered.*dfkd-engines build"):
            apply(synthesis, sources_of(synthesis), choices, EngineStore(own.store))

    @NEEDS_IT
    @pytest.mark.parametrize("part, network, name", [("unet", "unet", "unet"), ("vae", "decode", "decoder"),
                                                     ("", "gradient", "teacher")])  # fmt: skip
    def test_an_engine_of_other_networks_is_refused(self, own, copied, part, network, name):
        """Loaded networks that are not those of the files that the recipe was read from."""
        choices = tuple(choice for choice in chosen(own, "--backend", BACKEND) if choice.network == network)
        prior, teacher = copied(own.prior), copied(own.teacher)
        nudge(next(((prior / part) if part else teacher).glob("*.safetensors")))
        synthesis = prepare(options_of(prior, teacher))
        with pytest.raises(EngineError) as caught:
            apply(synthesis, sources_of(synthesis), choices, EngineStore(own.store))
        text = str(caught.value)
        assert f"the engine {network} {choices[0].key} is stale: its {name}_digest is" in text
        assert f"delete {own.store / DIGESTS} and run dfkd-engines build" in text
