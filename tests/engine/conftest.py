"""What several files share: the thinned Stable Diffusion pipeline, and the small networks as ONNX files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dfkd_engine.priors.prior import Prior


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_sd import make_tiny_sd  # here: the kernels' GPU tests are collected without diffusers too

    return make_tiny_sd(tmp_path_factory.mktemp("prior") / "sd")


@pytest.fixture(scope="session")
def prior(prior_folder: Path) -> Prior:
    return Prior.from_pretrained(prior_folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a network in small_graphs -> its ONNX file, exported once."""
    from dfkd_engine.export import to_onnx
    from tests.engine import small_graphs

    made: dict[str, Path] = {}

    def of(network: str) -> Path:
        if network not in made:
            made[network] = tmp_path_factory.mktemp(network) / "model.onnx"
            to_onnx(small_graphs.graph(network), made[network])
        return made[network]

    return of
