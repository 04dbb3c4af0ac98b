"""Imports flow kernels <- engine <- dfkd <- benchmarks, tests; inside dfkd down one order of folders; and nothing that
makes a student can reach real data.

Read from the syntax tree, so that an import inside a function counts too; those for type checkers alone do not.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dfkd
from dfkd.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"dfkd_kernels": ROOT / "kernels", "dfkd_engine": ROOT / "engine", "dfkd": ROOT}
PACKAGES |= {"benchmarks": ROOT, "tests": ROOT}
MAY_IMPORT = {
    "dfkd_kernels": {"dfkd_kernels"},
    "dfkd_engine": {"dfkd_kernels", "dfkd_engine"},
    "dfkd": {"dfkd_kernels", "dfkd_engine", "dfkd"},
    "benchmarks": set(PACKAGES) - {"tests"},
    "tests": set(PACKAGES),
}
# The folders and files of dfkd; each imports those before it alone.
ORDER = (
    "allocator",
    "errors",
    "config",
    "priors",
    "files",
    "logs",
    "model_card",
    "resizing",
    "rgb",
    "runtime",
    "extension",
    "teachers",
    "data",
    "compiled",
)
ORDER += ("synthesis", "evaluation", "training", "export", "job", "rounds", "run", "cli", "__main__")
# The ways from noise to student. The commands and the training of teachers stand apart: they may read real images.
DATA_FREE = ("dfkd_kernels", "dfkd_engine", "dfkd.teachers", "dfkd.data", "dfkd.compiled", "dfkd.synthesis")
DATA_FREE += ("dfkd.training", "dfkd.cli.generate")
REAL_DATA, SUPERVISED = "dfkd.evaluation", ("dfkd.training.teacher", "dfkd.training.prior")
REAL_SOURCES = {"mlxtend", "load_sample_image", "load_sample_images"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the project."""
    files = [(file, place) for top, place in PACKAGES.items() for file in sorted((place / top).rglob("*.py"))]
    dotted = [(".".join(file.relative_to(place).with_suffix("").parts), file) for file, place in files]
    return {name.removesuffix(".__init__"): file for name, file in dotted}


MODULES = modules()


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str, file: Path) -> None:
        self.found: set[str] = set()
        self.package = module if file.name == "__init__.py" else module.rpartition(".")[0]

    def visit_If(self, node: ast.If) -> None:
        for inner in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else ast.iter_child_nodes(node):
            self.visit(inner)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self.package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        origin = ".".join(part for part in (base, node.module) if part)
        self.found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(module: str, file: Path) -> frozenset[str]:
    """Dotted names that a file imports, wherever it does; `from a import b` gives a and a.b."""
    visitor = _Imports(module, file)
    visitor.visit(tree_of(file))
    return frozenset(visitor.found)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@cache
def reachable(start: str) -> dict[str, str]:
    """Project modules that importing (or calling into) `start` can load -> the module that imports them."""
    via, queue = {start: ""}, [start]
    while queue:
        module = queue.pop()
        wanted = {name for name in imports(module, MODULES[module]) if name in MODULES}
        parents = {name.rsplit(".", depth)[0] for name in {module, *wanted} for depth in range(1, name.count(".") + 1)}
        for name in (wanted | parents) & MODULES.keys() - via.keys():
            via[name] = module
            queue.append(name)
    return via


def test_the_tree_is_read_at_all() -> None:
    assert {"dfkd_kernels", "dfkd_engine", "dfkd", "dfkd.errors"} <= MODULES.keys()
    assert "dfkd.errors" in imports("dfkd.cli.parse", MODULES["dfkd.cli.parse"])
    assert "dfkd.config.words" in reachable("dfkd.cli.generate")


@pytest.mark.parametrize("top", PACKAGES)
def test_imports_flow_one_way(top: str) -> None:
    against = [
        f"{module} imports {name}"
        for module, file in MODULES.items()
        if within(module, top)
        for name in imports(module, file)
        if name.split(".")[0] in set(PACKAGES) - MAY_IMPORT[top]
    ]
    assert not against, against


def test_the_folders_of_dfkd_form_one_order() -> None:
    def place(module: str) -> str:
        return module.split(".")[1]

    inside = {module: file for module, file in MODULES.items() if within(module, "dfkd") and module != "dfkd"}
    assert {place(module) for module in inside} == set(ORDER)
    against = [
        f"{module} imports {name}"
        for module, file in inside.items()
        for name in imports(module, file) & inside.keys()
        if ORDER.index(place(name)) > ORDER.index(place(module))
    ]
    assert not against, against


def test_the_library_uses_no_name_of_the_public_api() -> None:
    """Its names are imported on demand, which a syntax tree of imports does not show."""
    lazy = set(dfkd._HOME)
    for module, file in MODULES.items():
        if within(module, "dfkd") and module != "dfkd":
            found = (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute))
            used = {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == "dfkd"}
            used |= {name.removeprefix("dfkd.") for name in imports(module, file)}
            assert not used & lazy, f"{module} uses dfkd.{', dfkd.'.join(used & lazy)}"


@pytest.mark.parametrize("start", DATA_FREE)
def test_no_way_to_real_data(start: str) -> None:
    inside = [module for module in MODULES if within(module, start) and module not in SUPERVISED]
    assert inside, f"{start} does not exist"
    for module in inside:
        reached = reachable(module)
        ways = [f"{name} by way of {via}" for name, via in reached.items() if within(name, REAL_DATA)]
        assert not ways, f"{module} reaches {ways}"
        for name in reached.keys() - {"dfkd"}:  # whose lazy names the library does not use, see above
            # dynamic imports would pass by the syntax tree of import statements
            assert REAL_DATA not in _strings(MODULES[name]), f"{name} names {REAL_DATA} in a string"
            sources = {part for found in imports(name, MODULES[name]) for part in found.split(".")} & REAL_SOURCES
            assert not sources, f"{name} imports {sources}"


def test_the_embedded_priors_world_holds_no_real_data() -> None:
    world = "benchmarks.prior_world"
    found = imports(world, MODULES[world])
    assert not [name for name in found if set(name.split(".")) & REAL_SOURCES]
    assert not [name for name in reachable(world) if within(name, REAL_DATA)]


def test_the_distill_command_reads_real_data_only_inside_a_function() -> None:
    module = "dfkd.cli.distill"
    others = reachable(module).items()
    assert {via for name, via in others if within(name, REAL_DATA) and not within(via, REAL_DATA)} <= {module}
    top = [node for node in tree_of(MODULES[module]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in top if REAL_DATA in ast.unparse(node)]


@cache
def _strings(file: Path) -> str:
    """Every string in the file that is not a docstring, joined."""
    tree = tree_of(file)
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    return "\n".join(texts)


HEAVY = ("torch", "numpy", "diffusers", "transformers", "matplotlib", "jinja2", "mlxtend", "scipy", "sklearn", "tqdm")
STARTS = """
import runpy, sys
from dfkd.cli import COMMANDS

for command in COMMANDS:
    for argument, status in ("--help", 0), ("--no-such-option", 2):
        sys.argv = [command, argument]
        try:
            runpy.run_module("dfkd.cli." + command.replace("-", "_"), run_name="__main__")
        except SystemExit as stopped:
            assert (stopped.code or 0) == status, (command, argument, stopped.code)
        else:
            raise AssertionError(command + " has no __main__")
    heavy = {*sys.modules} & {*HEAVY}
    assert not heavy, (command, heavy)
"""


def test_commands_explain_themselves_without_torch() -> None:
    """`python -m dfkd.cli.COMMAND` with --help and with a wrong option loads nothing that takes a second to load."""
    script = STARTS.replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: dfkd-") == len(COMMANDS)
    assert str(ROOT) not in done.stdout, "an absolute path in --help"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: unknown argument --no-such-option")]
    assert len(errors) == len(COMMANDS)
