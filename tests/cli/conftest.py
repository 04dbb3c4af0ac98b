"""A small prior and a small teacher on disk, made once; and a dfkd-generate that takes them."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.cli.small_generate import SMALL, save_classifier, status_of


@pytest.fixture(scope="session")
def small_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.synthesis.small_sd import make_small_sd

    return make_small_sd(tmp_path_factory.mktemp("small") / "prior")


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("small") / "teacher")


@pytest.fixture(scope="session")
def cached_prior() -> Callable[..., Any]:
    from dfkd_engine.priors.prior import Prior

    return cache(Prior.from_pretrained)


@pytest.fixture
def call(
    small_prior: Path, small_teacher: Path, cached_prior: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """call(*argv) -> the exit status of dfkd-generate on the small networks; the last of two same flags counts."""
    from dfkd.cli import generate
    from dfkd_engine.priors.prior import Prior

    monkeypatch.setattr(Prior, "from_pretrained", cached_prior)
    return partial(status_of, generate.main, "--teacher-checkpoint", small_teacher, "--prior", small_prior, *SMALL)
