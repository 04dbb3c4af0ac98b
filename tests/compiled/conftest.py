"""A store to be changed, and the backend `unchanged` under a name of the registry."""

import pytest

from dfkd_engine.backends import BACKENDS
from dfkd_engine.store import EngineStore
from tests.compiled.small_functions import Unchanged


@pytest.fixture
def store(tmp_path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def unchanged(monkeypatch) -> Unchanged:
    backend = Unchanged()
    monkeypatch.setitem(BACKENDS, backend.name, backend)
    return backend
