"""Which packages are there, asked without importing them."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def missing(*modules: str) -> list[str]:
    """Those of the top-level modules that cannot be imported."""
    return [module for module in modules if find_spec(module) is None]


def versions(*distributions: str) -> dict[str, str]:
    """Distribution -> version, without those that are not installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
