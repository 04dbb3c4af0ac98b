"""The thinned Stable Diffusion pipeline, written and loaded once."""

from pathlib import Path

import pytest

from dfkd_engine.prior import Prior
from tests.tiny_sd import make_tiny_sd


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("prior") / "sd")


@pytest.fixture(scope="session")
def prior(prior_folder: Path) -> Prior:
    return Prior.from_pretrained(prior_folder)
