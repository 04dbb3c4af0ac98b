"""Which packages are there, asked without importing them."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def missing(*modules: str) -> list[str]:
    """The top-level modules among these that cannot be imported."""
    return [module for module in modules if find_spec(module) is None]


def versions(*distributions: str) -> dict[str, str]:
    """Version of each distribution that is installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
