"""Objects by name, with settings in parentheses: built-in ones and those in a file of the user's own.

    deepinversion(steps=200)          a dataclass or function registered under that name
    my_losses.py:Entropy(weight=0.1)  the object of that name in a Python file, which is executed

Used for guidance losses, synthesizers, samplers, distillation losses and backends. Only what the user typed may name a
file; nothing that is read from disk does.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dfkd.config import plain
from dfkd.errors import UsageError
from dfkd_engine.errors import EngineError, first_line


def split(text: str) -> tuple[str, dict[str, Any]]:
    """`name(a=1, b="x")` -> ("name", {"a": 1, "b": "x"}); bare words are text. Raises UsageError."""
    name, opened, rest = text.strip().partition("(")
    if not opened:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args and all(word.arg for word in call.keywords)
        return name, {str(word.arg): _value(word.value) for word in call.keywords}
    except (SyntaxError, AssertionError, ValueError):
        why = "wanted is NAME or NAME(setting=value, ...), with quotes around paths"
        raise UsageError(f"{text!r} cannot be read", why) from None


def resolve(text: str, known: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]]:
    """The object that `text` names and the settings in its parentheses.

    known: built-in objects by name. what: such as "sampler", for the error.
    Raises UsageError: an unknown name, a file that cannot be executed, or one without that object.
    """
    name, settings = split(text)
    if ".py:" not in name:
        if name not in known:
            why = f"known are {', '.join(known)}, or FILE.py:NAME" if known else "wanted is FILE.py:NAME"
            raise UsageError(f"unknown {what} {name!r}", why)
        return known[name], settings
    file, _, wanted = name.rpartition(":")
    module = load_file(Path(file))
    if not hasattr(module, wanted):
        raise UsageError(f"{file} has no {wanted!r}", f"the {what} {text!r} names it", "correct the name")
    return getattr(module, wanted), settings


def make(text: str, known: Mapping[str, Any], what: str) -> Any:
    """The object that `text` names, called with the settings in its parentheses. Raises UsageError as `resolve`, and
    for settings that it does not take."""
    found, settings = resolve(text, known, what)
    with settings_of(f"{what} {text!r}"):
        return found(**settings)


@contextmanager
def settings_of(what: str) -> Iterator[None]:
    """Inside, settings are bound to a signature or checked: TypeError and ValueError become a UsageError on `what`."""
    try:
        yield
    except EngineError:  # a ValueError with words of its own
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(what, str(error), "correct its settings") from None


@contextmanager
def running(what: str) -> Iterator[None]:
    """Inside, code of the user's own runs: whatever it raises becomes a UsageError that names it."""
    try:
        yield
    except (UsageError, EngineError):
        raise
    except Exception as error:
        raise UsageError(f"{what} fails", f"{type(error).__name__}: {first_line(error)}", "correct it") from error


def load_file(file: Path) -> Any:
    """A Python file as a module, executed once a process. Raises UsageError."""
    name = f"dfkd_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise UsageError(f"no file {file}", todo="give a Python file, as FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise UsageError(f"{file} cannot be executed", f"{type(error).__name__}: {error}") from error
    return module


def described(thing: Any) -> dict[str, Any]:
    """What an object is, in JSON's types: class, fields where it is a dataclass, and the digest of its source file.

    It enters identities and engine keys, so that a changed field or a changed line of code is another run.
    """
    cls = thing if isinstance(thing, type) or (callable(thing) and not is_dataclass(thing)) else type(thing)
    fields = plain(asdict(thing)) if is_dataclass(thing) and not isinstance(thing, type) else {}
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    return {"name": cls.__qualname__, "fields": fields, "source": source_digest(Path(file)) if file else _typed(cls)}


def _typed(cls: Any) -> str:
    """The digest of what was typed into a notebook, as far as Python still knows it."""
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def source_digest(*files: Path) -> str:
    """One digest of Python files as they are parsed: comments, docstrings and layout do not count."""
    total = hashlib.sha256()
    for file in files:
        total.update(_parsed(file))
    return total.hexdigest()[:16]


@cache  # parsing takes longer than sampling some images; a module is executed once a process too
def _parsed(file: Path) -> bytes:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return ast.dump(tree).encode()


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
