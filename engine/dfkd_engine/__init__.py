"""Compiled networks: tensors and graphs only; no teacher, no data set, no loss lives here."""

import ast
import hashlib
from functools import cache
from pathlib import Path

# Priors that are known by a name, and the folder of each. It stands here, where nothing imports torch.
EMBEDDED: dict[str, Path] = {}


@cache
def sources_digest() -> str:
    """One digest of this package's Python files: a part of every engine's key, since they decide what is compiled.

    Files are taken as they are parsed, so comments, docstrings and layout do not count.
    """
    root, total = Path(__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                first = body[0].value
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    del body[0]
        total.update(f"{file.relative_to(root).as_posix()} {ast.dump(tree)}\n".encode())
    return total.hexdigest()
