"""The store in good order: an engine is built once, found by recipe or key, explained, listed and pruned."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dfkd_engine.storage.payload
from dfkd_engine.errors import EngineError
from dfkd_engine.storage.manifest import require_fits
from dfkd_engine.storage.recipe_links import recipe_key
from dfkd_engine.store import EngineStore
from tests.engine.small_store import FILES, OTHER, RECIPE, SPEC, make, never


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


def test_an_empty_store_is_read_without_being_made(store: EngineStore) -> None:
    assert store.find(RECIPE) is None
    assert store.get(SPEC.key()) is None
    assert store.problem(SPEC.key()) == "it is missing"
    assert (store.list(), store.verify(), store.prune(set())) == ((), [], 0)
    assert store.explain(RECIPE) == [("network", "(absent)", "decode")]
    assert not store.root.exists()


def test_built_once_then_found(store: EngineStore) -> None:
    built = store.build(SPEC, RECIPE, make)
    assert built.facts == {"parity": {"relative": 1e-6}, "seconds": 0.5}
    assert built.bytes == sum(map(len, FILES.values()))
    assert store.build(SPEC, RECIPE, never) == built
    again = EngineStore(store.root)
    assert again.find(RECIPE) == again.get(SPEC.key()) == built
    assert again.list() == (built,)
    assert again.verify() == [(SPEC.key(), "decode", None)]
    assert again.explain(RECIPE) == []
    folder = again.payload(built)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")} == FILES
    assert sorted(path.name for path in store.root.iterdir()) == sorted([SPEC.key(), "locks", "partial", "recipes"])
    assert not list((store.root / "partial").iterdir()) and not list((store.root / "locks").iterdir())


def test_another_recipe_is_linked_not_built(store: EngineStore) -> None:
    built = store.build(SPEC, RECIPE, make)
    edited, later = RECIPE | {"sources": "s1"}, RECIPE | {"sources": "s2"}
    assert store.find(edited) is None
    assert store.build(SPEC, edited, never) == built
    assert store.adopt(later, SPEC.key()) == built
    assert store.find(edited) == store.find(later) == store.find(RECIPE) == built


def test_nothing_is_adopted_that_is_not_there(store: EngineStore) -> None:
    with pytest.raises(EngineError, match="missing"):
        store.adopt(RECIPE, SPEC.key())
    with pytest.raises(EngineError, match="no engine's key"):
        store.adopt(RECIPE, "../elsewhere")


@pytest.mark.parametrize(
    "change", [{"device": "cuda sm_90"}, {"versions.torch": "2.14.0"}, {"flags.freezing": "0"}, {"network": "unet"}]
)
def test_a_recipe_never_gives_an_engine_that_contradicts_it(store: EngineStore, change: dict[str, str]) -> None:
    store.build(SPEC, RECIPE, make)
    wrong = RECIPE | change
    assert store.find(wrong) is None
    field = next(iter(change))
    for link in (lambda: store.adopt(wrong, SPEC.key()), lambda: store.build(SPEC, wrong, never)):
        with pytest.raises(EngineError, match="does not fit") as caught:
            link()
        assert f"{field} is {change[field]} in the recipe" in caught.value.why
    # a link that was written by hand
    path = store.root / "recipes" / f"{recipe_key(wrong)}.json"
    path.write_text(json.dumps({"recipe": wrong, "engine": SPEC.key()}))
    assert store.find(wrong) is None
    assert store.explain(wrong) == [("engine", "it was built for another recipe", SPEC.key())]


@pytest.mark.parametrize("recipe", [{}, {"size": "64"}, {"network": "unet", "size": 64}])
def test_what_is_no_recipe(store: EngineStore, recipe: dict[str, Any]) -> None:
    for use in (store.find, store.explain, lambda wrong: store.build(SPEC, wrong, never)):
        with pytest.raises(EngineError, match="recipe"):
            use(recipe)


def test_an_engine_of_another_machine_is_refused_by_field(store: EngineStore) -> None:
    manifest = store.build(SPEC, RECIPE, make)
    require_fits(manifest, {"torch": "2.13.0"}, SPEC.device)
    with pytest.raises(EngineError, match="does not fit this machine") as caught:
        require_fits(manifest, {"torch": "2.14.0", "triton": "3.6"}, "cpu x86_64 avx512")
    assert caught.value.why.split("; ") == [
        "device is cpu x86_64 avx2 there and cpu x86_64 avx512 here",
        "versions.torch is 2.13.0 there and 2.14.0 here",
        "versions.triton is (absent) there and 3.6 here",
    ]


def test_explain_names_the_fields_of_the_nearest_recipe(store: EngineStore) -> None:
    store.build(SPEC, RECIPE, make)
    store.build(OTHER, RECIPE | {"prior": "p1", "size": "128"}, make)
    unet = replace(SPEC, network="unet")
    store.build(unet, RECIPE | {"network": "unet", "prior": "p2"}, make)
    assert store.explain(RECIPE | {"prior": "p2", "losses": "bn"}) == [
        ("prior", "p0", "p2"),
        ("losses", "(absent)", "bn"),
    ]
    assert store.explain(RECIPE | {"prior": "p1", "size": "256"}) == [("size", "128", "256")]
    nearest = store.nearest(RECIPE | {"size": "256"})
    assert nearest is not None and nearest[1].key == SPEC.key()


def test_a_recipe_that_leads_nowhere_is_a_miss(store: EngineStore) -> None:
    store.build(SPEC, RECIPE, make)
    os.rename(store.root / SPEC.key(), store.root / "elsewhere")
    assert store.find(RECIPE) is None
    assert store.explain(RECIPE) == [("engine", "it is missing", SPEC.key())]
    assert store.explain(RECIPE | {"size": "32"}) == [("network", "(absent)", "decode")]
    assert store.prune(set()) > 0
    assert not list((store.root / "recipes").iterdir())


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b'{"recipe": 3, "engine": "x"}', b"\xff", b'{"recipe": {}}', b"[" * 10**5]
)
def test_links_are_a_cache(store: EngineStore, text: bytes) -> None:
    built = store.build(SPEC, RECIPE, make)
    (link,) = (store.root / "recipes").iterdir()
    link.write_bytes(text)
    assert store.find(RECIPE) is None
    assert store.build(SPEC, RECIPE, never) == built
    assert store.find(RECIPE) == built


def test_a_link_is_followed_by_its_whole_recipe(store: EngineStore) -> None:
    store.build(SPEC, RECIPE, make)
    (link,) = (store.root / "recipes").iterdir()
    link.rename(link.with_name(f"{recipe_key(RECIPE | {'size': '1'})}.json"))
    assert store.find(RECIPE | {"size": "1"}) is None


def test_prune(store: EngineStore) -> None:
    kept, gone = store.build(SPEC, RECIPE, make), store.build(OTHER, RECIPE | {"prior": "p1"}, make)
    leftover = store.root / "partial" / f"{gone.key}.0123" / "payload"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(bytes(1000))
    assert store.prune({kept.key}, older_than=timedelta(hours=1)) == 1000
    assert {manifest.key for manifest in store.list()} == {kept.key, gone.key}
    assert store.prune({kept.key}) > gone.bytes
    assert store.list() == (kept,)
    assert store.find(RECIPE) == kept
    assert len(list((store.root / "recipes").iterdir())) == 1
    assert store.prune({kept.key}) == 0


def test_every_file_is_hashed_before_the_first_load_only(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    built = store.build(SPEC, RECIPE, make)
    hashed: list[str] = []
    real = dfkd_engine.storage.payload.sha256
    monkeypatch.setattr(dfkd_engine.storage.payload, "sha256", lambda path: hashed.append(path.name) or real(path))
    store.payload(built)
    assert sorted(hashed) == ["model.pt2", "weights.bin"]
    store.payload(built)
    EngineStore(store.root).payload(built)
    assert len(hashed) == 2
    # same size, same time of change by the file's own account: the kernel's account betrays it
    path = store.root / built.key / "payload" / "model.pt2"
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(EngineError, match=r"damaged: model\.pt2 was altered"):
        store.payload(built)


def _tensors_and_nothing(folder: Path) -> Mapping[str, Any]:
    make(folder)
    return {"relative": float("nan")}


def _linked(folder: Path) -> Mapping[str, Any]:
    (folder / "model").symlink_to("/etc/hostname")
    return {}


@pytest.mark.parametrize(
    "wrong, word",
    [(lambda folder: {}, "no file"), (_linked, "is a link"), (_tensors_and_nothing, "JSON"), (never, "nothing is to")],
)
def test_a_builder_that_fails_leaves_nothing(store: EngineStore, wrong: Any, word: str) -> None:
    with pytest.raises((EngineError, AssertionError), match=word):
        store.build(SPEC, RECIPE, wrong)
    assert store.find(RECIPE) is None
    assert [path for path in store.root.rglob("*") if path.name not in ("recipes", "partial", "locks")] == []
    store.build(SPEC, RECIPE, make)
    assert store.verify()[0].problem is None


def test_an_error_of_the_builder_passes_as_it_is(store: EngineStore) -> None:
    def wrong(folder: Path) -> Mapping[str, Any]:
        raise FileNotFoundError(2, "No such file or directory", "g++")

    with pytest.raises(FileNotFoundError, match=r"g\+\+"):
        store.build(SPEC, RECIPE, wrong)


recipes = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["1", "2", "é"])).map(lambda d: d | {"network": "n"})


@given(recipes, recipes)
def test_a_recipe_key_is_the_recipe(a: dict[str, str], b: dict[str, str]) -> None:
    assert (recipe_key(a) == recipe_key(b)) == (a == b)
    assert recipe_key(dict(reversed(a.items()))) == recipe_key(a)
