"""hypothesis where it is installed; on a bare GPU machine its tests are skipped and the others of their files run."""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    from unittest.mock import MagicMock

    st = MagicMock()

    def given(*strategies: object, **named: object) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**named: object) -> object:
        return lambda test: test


__all__ = ["given", "settings", "st"]
