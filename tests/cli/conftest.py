"""A small prior and a small teacher on disk, made once; and a dfkd-generate that takes them."""

from functools import cache, partial

import pytest

from dfkd.cli import generate, prepare
from tests.cli.small_generate import SMALL, save_classifier, status_of
from tests.compiled.small_engines import built, with_own_store
from tests.synthesis.small_sd import make_small_sd


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A prior and a teacher whose engines are built; `own` is the same with a store to be changed."""
    return built(tmp_path_factory.getbasetemp() / "engines")


@pytest.fixture
def own(place, tmp_path):
    return with_own_store(place, tmp_path)


@pytest.fixture(scope="session")
def small_prior(tmp_path_factory):
    return make_small_sd(tmp_path_factory.mktemp("small") / "prior")


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("small") / "teacher")


@pytest.fixture(scope="session")
def cached_load_prior():
    return cache(prepare.load_prior)


@pytest.fixture
def call(small_prior, small_teacher, cached_load_prior, monkeypatch):
    """call(*argv) -> exit status. The last of two same flags counts, so that a test can give its own."""
    monkeypatch.setattr(prepare, "load_prior", cached_load_prior)
    return partial(status_of, generate.main, "--teacher-checkpoint", small_teacher, "--prior", small_prior, *SMALL)
