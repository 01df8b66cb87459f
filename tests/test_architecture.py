"""The house rules: who may import whom, what stays light, what runs without scan readers, what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lungseg

PACKAGE = Path(str(lungseg.__file__)).parent
TESTS = Path(__file__).parent
ORDER = (
    "cli", "stages", "report", "evaluation", "segmentation", "diffusion", "radiomics", "store", "scan", "config",
    "models", "tissue", "errors",
)  # fmt: skip
"""Import only to the right; `tissue` and `errors` stand side by side."""
MAX_LINES = 500


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; the package's own ``__init__`` is ''."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name below lungseg) of every import of the package, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name[8:]) for alias in node.names if alias.name.startswith("lungseg."))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if module else []
                above = above[: len(above) - node.level + is_package]
                base = ".".join(["lungseg", *above, *([base] if base else [])])
            if base == "lungseg":
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif base.startswith("lungseg."):
                yield node.lineno, base[8:]


def bad_arrows(root: Path) -> list[str]:
    """Imports from the right to the left, and imports of what is in no room."""
    bad = []
    for module, path in modules(root).items():
        if not module:
            continue  # the root offers the stages by name
        room = module.split(".")[0]
        if room not in ORDER:
            bad.append(f"{module}: not in any room")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in imported(tree, module, is_package=path.name == "__init__.py"):
            there = target.split(".")[0]
            if there == "__version__" or there == room:
                continue
            if there not in ORDER or ORDER.index(there) < ORDER.index(room) or {there, room} == {"tissue", "errors"}:
                bad.append(f"{module}, line {line}: imports {target}")
    return bad


def test_imports_go_to_the_right_only() -> None:
    assert bad_arrows(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("store/a.py", "from lungseg.stages.b import c", "store.a, line 1: imports stages.b"),
        ("store/a.py", "def f():\n    import lungseg.cli.app", "store.a, line 2: imports cli.app"),
        ("store/a.py", "if x:\n    from lungseg import diffusion", "store.a, line 2: imports diffusion"),
        ("store/a.py", "from ..stages import b", "store.a, line 1: imports stages"),
        ("store/a.py", "from .. import cli", "store.a, line 1: imports cli"),
        ("store/__init__.py", "from ..cli import app", "store, line 1: imports cli"),
        ("tissue.py", "from lungseg.config import x", "tissue, line 1: imports config"),
        ("tissue.py", "from lungseg.errors import InputError", "tissue, line 1: imports errors"),
        ("store/a.py", "from lungseg import train_ddpm", "store.a, line 1: imports train_ddpm"),
        ("utils.py", "", "utils: not in any room"),
        ("common/a.py", "", "common.a: not in any room"),
        ("stages/a.py", "from lungseg.stages.b import c\nfrom lungseg import __version__", None),
        ("stages/a.py", "from . import b\nfrom ..store import c\nfrom .b import d", None),
        ("scan/a.py", "import lungseg\nimport lungseg.errors\nfrom lungseg.config.fields import option", None),
        ("store/__init__.py", "from . import a\nfrom .a import b", None),
    ],
)
def test_the_checker_sees_bad_arrows(tmp_path: Path, file: str, text: str, found: str | None) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (tmp_path / "__init__.py").write_text("from lungseg.stages import everything")
    assert bad_arrows(tmp_path) == ([found] if found else [])


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


HEAVY = ("torch", "SimpleITK", "sklearn", "skimage", "scipy", "matplotlib", "h5py", "numpy", "pydicom", "radiomics")


@pytest.mark.parametrize(
    "code",
    [
        "import lungseg",
        "import lungseg.cli.app",
        "import sys; sys.argv = ['lungseg', '--help']; import lungseg.cli.app as a\n"
        "try: a.main()\nexcept SystemExit: pass",
        # not train-ddpm: its dry run asks torch for the devices and counts the network's memory
        "import sys; sys.argv = ['lungseg', 'cluster', 's', '--model', 'm', '--dry-run']; import lungseg.cli.app as a\n"
        "try: a.main()\nexcept SystemExit: pass",
    ],
    ids=["import", "import-cli", "help", "dry-run"],
)
def test_help_is_light(code: str) -> None:
    done = python("-c", f"{code}\nimport sys\nprint(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)")
    assert done.returncode == 0
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_stages_are_functions_of_the_package() -> None:
    code = "import lungseg; print(*[callable(getattr(lungseg, name)) for name in lungseg.__all__[1:]])"
    assert set(python("-c", code).stdout.split()) == {"True"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lungseg.nothing


def test_gpu_rooms_import_without_readers_of_scans() -> None:
    done = python(TESTS / "gpu_node.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded: []\n"


@pytest.mark.slow
def test_gpu_stages_run_without_readers_of_scans(tmp_path: Path) -> None:
    done = python(TESTS / "gpu_node.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded: []\n"


SOURCES = modules(PACKAGE)
FORBIDDEN = {
    "pickle": r"^\s*(import|from)\s+(c?[pP]ickle|dill|cloudpickle|shelve|marshal)\b",
    "unsafe torch.load": r"weights_only\s*=\s*False",
    "unsafe numpy.load": r"allow_pickle\s*=\s*True",
    "yaml": r"yaml\.(unsafe_)?load\(",
    "eval": r"(?<![\w.])(eval|exec)\(",
    "shell": r"shell\s*=\s*True|os\.system\(|os\.popen\(",
    "archives": r"\.extractall\(",
    "joblib files": r"joblib\.(load|dump)\(",
    "network": r"^\s*(import|from)\s+(requests|urllib\.request|http\.client|ftplib)\b",
}


def offences(text: str) -> set[str]:
    return {name for name, pattern in FORBIDDEN.items() if re.search(pattern, text, re.MULTILINE)}


def test_security_1_2_6_no_code_from_files() -> None:
    """RELIABILITY 4: nothing that runs code found in data, no shell, no blind unpacking, no download."""
    found = {name: offences(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", {"pickle"}), ("    from pickle import loads", {"pickle"}),
        ("torch.load(p, weights_only=False)", {"unsafe torch.load"}),
        ("np.load(p, allow_pickle = True)", {"unsafe numpy.load"}),
        ("yaml.load(x)", {"yaml"}), ("x = eval('1')", {"eval"}), ("exec(code)", {"eval"}),
        ("run(c, shell=True)", {"shell"}), ("z.extractall(p)", {"archives"}), ("joblib.load(p)", {"joblib files"}),
        ("import requests", {"network"}),
        ("module.eval()\n# no pickle here\nload(p, weights_only=True)\nmy_eval(x)", set()),
    ],
)  # fmt: skip
def test_the_grep_sees_what_it_should(text: str, found: set[str]) -> None:
    assert offences(text) == found


def test_torch_load_is_always_weights_only() -> None:
    for path in SOURCES.values():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load"):
                assert "weights_only=True" in ast.unparse(call) or "allow_pickle=False" in ast.unparse(call), path


def without_encoding(text: str) -> list[int]:
    """Lines that read or write text in whatever encoding the process has: SimpleITK's DICOM writer sets it to ASCII."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        method = isinstance(call.func, ast.Attribute)
        words = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
        modes = [word for word in words if re.fullmatch("[rwax]b?[+]?", word)]
        is_text = (method and name in ("read_text", "write_text")) or (
            name == "open" and (not method or modes) and not any("b" in mode for mode in modes)
        )
        if is_text and "encoding" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_text_is_always_read_and_written_as_utf8() -> None:
    found = {name: without_encoding(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    code = "p.read_text()\nopen(p)\nopen(p, 'rb')\nopen(p, encoding='utf-8')\np.open('w')\nstore.open(a, 'labels')\n"
    assert without_encoding(code) == [1, 2, 5]


@pytest.mark.parametrize("name", SOURCES)
def test_files_stay_small(name: str) -> None:
    assert len(SOURCES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_catch_all_rooms() -> None:
    names = {part for name in SOURCES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def public(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """Public functions, classes, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, node.name
            if isinstance(node, ast.ClassDef):
                methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
                yield from ((item, f"{node.name}.{item.name}") for item in methods if not item.name.startswith("_"))


def undocumented(text: str) -> list[str]:
    tree = ast.parse(text)
    bad = [] if ast.get_docstring(tree) or not tree.body else ["module: docstring"]
    for node, name in public(tree):
        doc = ast.get_docstring(node) or ""
        if not doc and not name.endswith(".forward"):  # the class says what a torch module computes
            bad.append(f"{name}: docstring")
        elif doc and len(doc.splitlines()[0]) > 117:  # a line of the file, quotes included
            bad.append(f"{name}: first line too long")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if node.returns is None or bare:
                bad.append(f"{name}: annotations {bare}")
    return bad


@pytest.mark.parametrize("name", SOURCES)
def test_public_names_are_documented_and_typed(name: str) -> None:
    assert undocumented(SOURCES[name].read_text(encoding="utf-8")) == []


def test_the_documentation_check_sees_gaps() -> None:
    text = '"""Module."""\nclass A:\n    """A."""\n    def f(self, x) -> None:\n        """F."""\ndef g():\n    pass\n'
    assert undocumented(text) == ["A.f: annotations ['x']", "g: docstring", "g: annotations []"]
    assert undocumented("x = 1") == ["module: docstring"]
