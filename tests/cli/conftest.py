"""A small prior and a small teacher on disk, made once."""

from pathlib import Path

import pytest

from tests.cli.small_generate import save_classifier


@pytest.fixture(scope="session")
def small_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.synthesis.small_sd import make_small_sd

    return make_small_sd(tmp_path_factory.mktemp("small") / "prior")


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("small") / "teacher")
