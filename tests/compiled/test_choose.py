"""Which engine is taken for which function: by name, by what was measured, by what a folder was begun with."""

import shutil

import pytest
import torch

from dfkd.compiled.choose import choose, describe, load_engines
from dfkd.compiled.engines import build
from dfkd.config import ComputeConfig
from dfkd.errors import UsageError
from dfkd_engine.backends import BACKENDS
from dfkd_engine.errors import EngineError
from dfkd_engine.store import EngineStore
from tests.compiled.small_functions import Unchanged, decode, gradient, milliseconds, set_facts
from tests.compiled.test_engines import BACKEND_FILE

COMMAND = "dfkd-engines build --mine"


FUNCTIONS = (decode(), gradient())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Backends that compile nothing, in the places of two built-in ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("inductor", "onnxruntime"):
            patch.setitem(BACKENDS, name, Unchanged(name))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    return store, {function.name: build(function, "onnxruntime", store)[1].key for function in FUNCTIONS}


@pytest.fixture
def built(store, original):
    """The keys of the onnxruntime engines of two functions, in a store to be changed; and the functions."""
    shutil.copytree(original[0].root, store.root)
    return original[1], FUNCTIONS


def chosen(store, functions, backend="auto", before=None):
    return choose(functions, ComputeConfig(backend=backend), store, before, COMMAND)


def by_name(choices):
    return {choice.network: (choice.backend, choice.key) for choice in choices}


def test_without_engines_it_is_eager(store):
    choices = chosen(store, (decode(), gradient()))
    assert by_name(choices) == dict.fromkeys(("decode", "gradient"), ("eager", None))
    assert describe(choices) == [f"decode, gradient: eager (no engine is built: {COMMAND})"]
    assert not store.root.exists() and load_engines(choices, store, "cpu") == {}


@pytest.mark.parametrize("engine, taken", [(1.89, True), (1.9, False), (2.5, False)])
def test_auto_takes_what_was_measured_quicker_by_five_percent(store, built, engine, taken):
    keys, functions = built
    set_facts(store, keys["decode"], milliseconds=milliseconds(engine, 2.0))
    set_facts(store, keys["gradient"], milliseconds=milliseconds(9.0, 1.0))
    choices = chosen(store, functions)
    assert by_name(choices)["decode"] == (("onnxruntime", keys["decode"]) if taken else ("eager", None))
    when = "6 rows, 1 threads, when it was built"
    assert describe(choices)[-1] == f"gradient: eager (1.0 ms a call, onnxruntime 9.0: {when})"
    if taken:
        assert describe(choices)[0] == f"decode: onnxruntime (1.89 ms a call, eager 2.0: {when})"


class TestRows:
    """An engine that was built for other calls is taken where the run's calls fit it."""

    @pytest.fixture
    def built_for(self, store, monkeypatch):
        monkeypatch.setitem(BACKENDS, "onnxruntime", Unchanged("onnxruntime", fixed_rows=True))
        return {rows: build(decode(rows=rows), "onnxruntime", store)[1].key for rows in (12, 8, 6)}

    @pytest.mark.parametrize("rows, taken", [(8, 8), (12, 12), (7, 8), (2, 6), (9, 12)])
    def test_its_own_first_then_the_smallest_that_holds_a_call(self, store, built_for, rows, taken):
        choices = chosen(store, (decode(rows=rows),), "onnxruntime")
        assert by_name(choices) == {"decode": ("onnxruntime", built_for[taken])}

    def test_none_holds_the_call(self, store, built_for):
        with pytest.raises(UsageError, match=r"there is no onnxruntime engine .*rows\.planned was"):
            chosen(store, (decode(rows=13, largest=13),), "onnxruntime")
        with pytest.raises(UsageError, match="there is no onnxruntime engine"):
            chosen(store, (decode(rows=7, one_shape=True),), "onnxruntime")


@pytest.mark.parametrize("inductor, winner", [(1.5, "inductor"), (2.5, "onnxruntime")])
def test_auto_takes_the_quickest_of_several(store, built, inductor, winner):
    keys, functions = built
    set_facts(store, keys["decode"], milliseconds=milliseconds(2.0, 3.0))
    other = build(functions[0], "inductor", store)[1].key
    set_facts(store, other, milliseconds=milliseconds(inductor, 3.0))
    assert by_name(chosen(store, functions))["decode"][0] == winner
    assert by_name(chosen(store, functions, "onnxruntime"))["decode"][0] == "onnxruntime"  # a name is a name


def test_a_named_backend_is_taken_however_quick(store, built):
    keys, functions = built
    for key in keys.values():
        set_facts(store, key, milliseconds=milliseconds(9.0, 1.0))
    choices = chosen(store, functions, "onnxruntime")
    assert by_name(choices) == {name: ("onnxruntime", key) for name, key in keys.items()}
    assert {choice.why for choice in choices} == {"--backend onnxruntime"}
    assert by_name(chosen(store, functions, "eager")) == dict.fromkeys(keys, ("eager", None))


def test_a_missing_engine_is_named_with_the_reason_and_the_command(store, built):
    _, functions = built
    with pytest.raises(UsageError) as caught:
        chosen(store, (decode(seed=1), functions[1]), "onnxruntime")
    text = str(caught.value)
    assert f"there is no onnxruntime engine in {store.root} for decode: decode: components.network was " in text
    assert text.endswith(f"build it: {COMMAND}.")
    with pytest.raises(UsageError, match="for decode, gradient: decode: it was not built with this backend yet"):
        chosen(store, functions, "inductor")


def test_a_damaged_manifest_is_no_engine(store, built):
    keys, functions = built
    (store.root / keys["decode"] / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"for decode: decode: it is damaged: manifest.json holds no manifest"):
        chosen(store, functions, "onnxruntime")
    assert by_name(chosen(store, functions))["decode"] == ("eager", None)


def test_a_run_of_which_nothing_can_be_an_engine(store):
    assert chosen(store, ()) == ()
    assert chosen(store, (), "eager") == ()
    with pytest.raises(UsageError, match=r"--backend inductor cannot be used: .*no backward pass.*--gradient latent"):
        chosen(store, (), "inductor")


def test_a_backend_that_cannot_run_here_is_refused(store):
    with pytest.raises(UsageError, match="--backend onnxruntime cannot be used: it is out of order"):
        chosen(store, (decode(dtype="bfloat16"),), "onnxruntime")


class TestContinued:
    """A folder goes on as it was begun: engines differ from one another in the last bits."""

    def test_with_the_same_engines(self, store, built):
        keys, functions = built
        for key in keys.values():
            set_facts(store, key, milliseconds=milliseconds(9.0, 1.0))
        choices = chosen(store, functions, before=keys)
        assert by_name(choices) == {name: ("onnxruntime", key) for name, key in keys.items()}
        assert {choice.why for choice in choices} == {"the folder was begun with it"}

    @pytest.mark.parametrize("begun", [(), ("decode",)])
    def test_without_those_that_came_later(self, store, built, begun):
        keys, functions = built
        for key in keys.values():
            set_facts(store, key, milliseconds=milliseconds(1.0, 9.0))
        expected = {name: ("onnxruntime", keys[name]) if name in begun else ("eager", None) for name in keys}
        before = {name: keys[name] for name in begun}
        assert by_name(chosen(store, functions, before=before)) == expected

    @pytest.mark.parametrize("backend, begun", [("onnxruntime", ()), ("eager", ("decode", "gradient"))])
    def test_not_with_another_backend_by_name(self, store, built, backend, begun):
        keys, functions = built
        with pytest.raises(UsageError, match="this folder cannot be continued: its decode was begun with"):
            chosen(store, functions, backend, before={name: keys[name] for name in begun})
        for same, before in (("onnxruntime", keys), ("eager", {})):
            assert {key for _, key in by_name(chosen(store, functions, same, before=before)).values()} == (
                set(keys.values()) if before else {None}
            )

    def test_by_a_named_backend_with_what_had_no_engine(self, store, built):
        """Short memory cut the calls after the folder was begun: functions of cut groups ran eagerly since."""
        keys, functions = built
        choices = chosen(store, functions, "onnxruntime", before={"decode": keys["decode"]})
        assert by_name(choices) == {"decode": ("onnxruntime", keys["decode"]), "gradient": ("eager", None)}

    def test_not_when_they_are_gone(self, store, built):
        keys, functions = built
        store.prune({keys["decode"]})
        with pytest.raises(UsageError) as caught:
            chosen(store, functions, before=keys)
        text = str(caught.value)
        assert "this folder cannot be continued" in text and f"the engine {keys['gradient']}" in text
        assert f"{store.root} does not hold it" in text and COMMAND in text and "--out" in text

    @pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
    def test_whatever_calls_fit_the_engine(self, store, built, backend):
        """Other --batch plans other rows, and may enter the key that a new engine would have."""
        keys, _ = built
        for own in ({"rows": 2}, {"rows": 9, "largest": 24}):
            choices = chosen(store, (decode(**own), gradient()), backend, before=keys)
            assert by_name(choices) == {name: ("onnxruntime", key) for name, key in keys.items()}
        with pytest.raises(UsageError, match="it takes up to 12 rows and a call has 13"):
            chosen(store, (decode(rows=13, largest=24),), backend, before=keys)
        with pytest.raises(UsageError, match="it takes up to 12 rows and a call has 6"):
            chosen(store, (decode(one_shape=True),), backend, before=keys)

    def test_not_where_a_field_contradicts(self, store, built):
        with pytest.raises(UsageError, match=r"components.network was \w{12} and is \w{12}; others differ"):
            chosen(store, (decode(seed=1),), before=built[0])
        with pytest.raises(UsageError, match="backend was onnxruntime and is inductor"):
            chosen(store, (decode(),), "inductor", before=built[0])

    def test_eager_by_name_is_no_reason_to_build(self, store, built):
        with pytest.raises(UsageError, match="and now --backend eager;") as caught:
            chosen(store, built[1], "eager", before=built[0])
        assert COMMAND not in str(caught.value)


class TestEightBits:
    """Asked for, an 8-bit function is an engine or the run is refused; not asked for, none is looked at."""

    @pytest.fixture
    def narrow(self, store, built, monkeypatch):
        function = decode(quantise="int8")
        monkeypatch.setattr("dfkd.compiled.engines._in_eight_bits", lambda function, graph: graph)
        return build(function, "onnxruntime", store)[1].key

    @pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
    def test_it_is_taken_however_slow(self, store, built, narrow, backend):
        set_facts(store, narrow, milliseconds=milliseconds(9.0, 1.0))
        functions = (decode(quantise="int8"), gradient())
        assert by_name(chosen(store, functions, backend))["decode"] == ("onnxruntime", narrow)
        set_facts(store, narrow, milliseconds=milliseconds(0.1, 9.0))
        assert by_name(chosen(store, built[1], backend))["decode"][1] != narrow

    @pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
    def test_without_it_the_run_is_refused(self, store, built, backend):
        with pytest.raises(UsageError, match=f"for decode fp8: decode: .* this --quantise yet.*{COMMAND}"):
            chosen(store, (decode(quantise="fp8"), built[1][1]), backend)

    def test_a_folder_that_was_begun_without_it_is_not_continued_with_it(self, store, built, narrow):
        keys, functions = built
        eight = (decode(quantise="int8"), functions[1])
        for before in (keys, {}):
            with pytest.raises(UsageError, match="this folder cannot be continued"):
                chosen(store, eight, before=before)
        assert by_name(chosen(store, eight, before={"decode": narrow}))["decode"] == ("onnxruntime", narrow)


class TestLoad:
    def test_engines_compute_the_functions(self, store, built):
        _, functions = built
        engines = load_engines(chosen(store, functions, "onnxruntime"), store, torch.device("cpu"))
        assert engines.keys() == {"decode", "gradient"}
        for function in functions:
            arguments = function.samples(3, 0)
            for got, want in zip(engines[function.name](*arguments), function.call(*arguments), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_a_damaged_payload_is_refused(self, store, built):
        keys, functions = built
        choices = chosen(store, functions, "onnxruntime")
        (store.root / keys["gradient"] / "payload" / "engine").write_text("9")
        with pytest.raises(EngineError, match=r"the engine gradient .* is damaged: .* altered.*dfkd-engines build"):
            load_engines(choices, store, "cpu")

    def test_a_backend_of_the_users_own(self, store, tmp_path):
        file = tmp_path / "own.py"
        file.write_text(BACKEND_FILE)
        name = f"{file}:Program"
        key = build(decode(), name, store)[1].key
        choices = chosen(store, (decode(),), name)
        assert by_name(choices) == {"decode": (name, key)}
        (x,) = decode().samples(3, 0)
        torch.testing.assert_close(load_engines(choices, store, "cpu")["decode"](x), decode().call(x))
