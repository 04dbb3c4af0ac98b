"""A prior, a teacher and engines on disk, made once; never changed: `copied` and `own_store` give a test its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compiled.small_engines import Place, built, folders, with_own_store


@pytest.fixture(scope="session")
def prior(tmp_path_factory) -> Path:
    return folders(tmp_path_factory.getbasetemp() / "engines")[0]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return folders(tmp_path_factory.getbasetemp() / "engines")[1]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return built(tmp_path_factory.getbasetemp() / "engines")


@pytest.fixture
def own(place, tmp_path) -> Place:
    """The place with a store to be changed."""
    return with_own_store(place, tmp_path)


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """copied(folder) -> the same folder, to be changed."""
    return lambda folder: shutil.copytree(folder, tmp_path / f"own-{folder.name}")
