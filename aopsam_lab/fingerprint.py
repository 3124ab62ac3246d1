"""A hash of what code does, so that results of other code are not taken for results of this one."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from importlib import resources


def code_fingerprint(names: Iterable[str]) -> str:
    """sha256 over source files of this package, named from its folder (`sam/zoo.py`), whatever their order.

    Comments, docstrings and layout do not count. Python versions may differ in how they parse, and so in the hash.
    """
    digest = hashlib.sha256()
    package = resources.files("aopsam_lab")
    for name in sorted(names):
        tree = ast.parse(package.joinpath(*name.split("/")).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                del body[0]
        digest.update(f"{name} {ast.dump(tree)}".encode())
    return digest.hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
