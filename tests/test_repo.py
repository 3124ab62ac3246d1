"""What must hold for the files under version control."""

import ast
import re
import shlex
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest

import aopsam_lab as aop
from aopsam_lab import files

ROOT = Path(__file__).resolve().parents[1]
MAX_WEIGHTS = 15 * 2**20
MAX_FILE = 5 * 2**20
# Spelled in parts, so that this file does not hold what it looks for.
FOLDERS = ["wo" + "rk/", "ro" + "ot/", "ho" + "me/", "Us" + "ers/"]
MACHINE_PATHS = re.compile(r"(?<![\w.~$/])/(?:" + "|".join(FOLDERS) + ")")
REGISTRIES = re.compile(
    "|".join(["index" + "-url", "find" + "-links", "pypi" + r"\.org", "files.python" + "hosted"])
)


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and path.suffix not in {".png", ".jpg", ".safetensors"}:
            found.append((path.relative_to(ROOT), data.decode("utf-8")))
    return found


def test_no_machine_paths_or_registry_hosts():
    found = [
        f"{path}:{n}: {line.strip()[:80]}"
        for path, text in texts()
        if "LICENSE" not in path.name
        for n, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line) or REGISTRIES.search(line)
    ]
    assert found == []


def test_notebooks_are_thin_stripped_and_parameterised():
    for path, text in texts():
        if path.suffix != ".ipynb" or path.parts[0] != "notebooks":
            continue
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        stripped = all(not cell.outputs and cell.execution_count is None for cell in code)
        assert stripped, f"{path} holds outputs: run nbstripout"
        assert all(len(cell.source.splitlines()) <= 25 for cell in code), path
        tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
        assert tags.count("parameters") == 1, f"{path} needs one cell tagged parameters"


def test_tracked_files_are_small():
    for path in tracked():
        official = path.name == "mobile_sam.safetensors"  # committed once, unchanged
        limit = 42e6 if official else MAX_WEIGHTS if "weights" in path.parts else MAX_FILE
        assert path.stat().st_size <= limit, path


def test_each_bundled_weights_file_has_its_card():
    weights = [path for path in tracked() if path.parent == ROOT / "aopsam_lab" / "weights"]
    cards = {path.stem for path in weights if path.suffix == ".md"}
    assert {path.stem for path in weights if path.suffix == ".safetensors"} <= cards


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_pinned_exactly():
    pinned = re.compile(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?")
    assert [line for line in requirement_lines() if not pinned.fullmatch(line)] == []


def test_what_is_imported_is_required():
    required = {
        re.split(r"[=;]", line)[0].strip().lower().replace("_", "-") for line in requirement_lines()
    }
    distributions = packages_distributions()
    own = (*(ROOT / "tests").glob("*.py"), *(ROOT / "notebooks" / "lessons").rglob("*.py"))
    ours = {"aopsam_lab", *(path.stem for path in own)}
    for path, text in texts():
        if path.suffix != ".py" or path.parts[0] not in {"aopsam_lab", "tests"}:
            continue
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module)
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours:
            offered_by = {d.lower().replace("_", "-") for d in distributions.get(name, [name])}
            assert offered_by & required, (path, name)


def test_make_hands_its_parameters_to_the_study():
    asked = "SAM=vit_h DATASET=lvis DATA=some/where PREDICTOR=p.safetensors DETECTOR=yolov8n N=7"
    asked += " WORKERS=2"
    command = ["make", "-n", "study", *asked.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = " ".join(run.stdout.replace("\\\n", " ").split())
    models = "--sam 'vit_h' --predictor 'p.safetensors' --detector 'yolov8n'"
    assert (
        f"{models} --dataset 'lvis:some/where' --n-images '7' --scheduler '2' main_comparison"
        in printed
    )


@pytest.mark.parametrize("name", ["a$x", "it's", "$(shell echo b)", "a$(", "$$", 'q"`id`', "a, b"])
def test_make_hands_on_a_text_as_it_is(name):
    run = subprocess.run(
        ["make", "-n", "study", f"DATASET={name}", f"OUT={name}", f"DATA={name}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (command,) = re.findall("(?m)^[^ ]*python -m aopsam_lab[^\n]*(?:\\\\\n[^\n]*)*", run.stdout)
    words = shlex.split(command)
    assert words[words.index("--dataset") + 1] == f"{name}:{name}"
    assert words[words.index("--reports") + 1] == name


def import_graph(known: dict[str, Path]) -> dict[str, set[str]]:
    return {name: files.imports(name, known) for name in known}


def test_no_module_imports_itself_through_others():
    TopologicalSorter(import_graph(files.modules())).prepare()  # CycleError names a circle


def test_the_explorer_needs_few_modules():
    behind = files.modules_behind([aop._EXPORTS["explore"]])
    assert "aopsam_lab.sam.zoo" in behind and len(behind) <= 35


def test_the_kit_is_short_and_so_are_its_modules_and_lines():
    counts = {"aopsam_lab": 0, "tests": 0}
    for path, text in texts():
        if path.parts[0] in counts and path.suffix in {".py", ".js", ".css"}:
            lines = text.splitlines()
            counts[path.parts[0]] += len(lines)
            assert len(lines) <= 450 and max(map(len, lines), default=0) <= 100, path
    assert 0 < counts["aopsam_lab"] <= 9500 and 0 < counts["tests"] <= 8500, counts


def test_a_circle_is_found_wherever_the_imports_stand(tmp_path):
    package = tmp_path / "kit"
    package.mkdir()
    sources = {
        "__init__": "",
        "a": "def f():\n    from kit import b",
        "b": "if TYPE_CHECKING:\n    from .c import x",
        "c": "import kit.a",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    graph = import_graph(files.modules(package))
    assert graph == {"kit": set(), "kit.a": {"kit.b"}, "kit.b": {"kit.c"}, "kit.c": {"kit.a"}}
    with pytest.raises(CycleError, match="cycle"):
        TopologicalSorter(graph).prepare()


def test_editors_see_the_public_names():
    stub = ast.parse((ROOT / "aopsam_lab" / "__init__.pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname: node.module for node in imported for alias in node.names}
    assert typed == aop._EXPORTS and sorted(typed) == aop.__all__
    for name in aop.__all__:
        assert getattr(aop, name) is not None
