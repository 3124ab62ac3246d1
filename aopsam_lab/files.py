"""Files written whole or not at all, and a hash of the code that scores depend on."""

import ast
import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_atomically(path: str | os.PathLike, data: bytes | str) -> Path:
    """Write text (as UTF-8) or bytes, never half of it; make the folder; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        beside.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(beside, path)
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """The files of a package's modules, by names such as `aopsam_lab.sam.zoo`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Which of the known modules a module imports anywhere: also in functions and for types."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(start if node.level else []), *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            # `from package import module` needs the module; other names are of the package itself
            found |= names if names <= known.keys() else names | {base}
    return found & known.keys() - {name}


def modules_behind(roots: Iterable[str], known: dict[str, Path] | None = None) -> set[str]:
    """The modules that `roots` import, directly or through others, and the roots themselves."""
    known, found, waiting = known or modules(), set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports(name, known)
    return found


def code_fingerprint(roots: Iterable[str]) -> str:
    """sha256 of `modules_behind` the roots; comments, docstrings and layout do not count."""
    digest, known = hashlib.sha256(), modules()
    for name in sorted(modules_behind(roots, known)):
        tree = ast.parse(known[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(f"{name} {ast.dump(tree)}".encode())
    return digest.hexdigest()
