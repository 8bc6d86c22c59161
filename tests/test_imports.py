# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. The table is part of the design: a change to it is a decision (docs/decisions/)."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

REFERENCE = ("torch", "transformers")
EXPORT_TOOLS = ("onnx", "onnx_ir", *REFERENCE)
# The bare package; `from pgxport import bundle` is read as pgxport.bundle.
ROOT = ("pgxport.errors", "pgxport.interrupts", "pgxport.text", "pgxport.files", "pgxport.__version__")
BUNDLE = ("numpy", "pydantic", *ROOT, "pgxport.bundle")
RUNNERS = (*BUNDLE, "PIL", "tokenizers", "pgxport.runners", "pgxport.machine")

# Every folder and root file of the package, the lowest first: each imports itself and those before it.
RANKS = (
    "errors", "interrupts", "text", "files", "machine", "bundle", "models", "hub", "runners", "compile", "metrics", "data",
    "activations", "exporter", "calib",
    "cluster", "benchmarking", "reporting", "tuning", "inspection", "doctor", "demo", "terminal", "cli",
)  # fmt: skip


@dataclass(frozen=True)
class Law:
    """What the files that match may import besides the standard library (`only`), or may not (`never`)."""

    files: tuple[str, ...]
    reason: str
    remedy: str
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()
    but_not: tuple[str, ...] = ()
    at_module_level: bool = False  # the law does not mind imports inside functions

    def covers(self, file: str) -> bool:
        return any(fnmatchcase(file, p) for p in self.files) and not any(fnmatchcase(file, p) for p in self.but_not)

    def breaks(self, name: str) -> bool:
        if self.only is None:
            return is_in(name, self.never)
        return name.split(".")[0] not in sys.stdlib_module_names and not is_in(name, self.only)


LAWS = (
    Law(
        ("text.py",),
        only=("rich",),
        reason="every room uses it, and `pgx --help` loads it",
        remedy="hand it text and numbers; rich, which makes the tables, is imported inside a function",
    ),
    Law(
        ("errors.py", "files.py", "bundle/*", "compile/lint.py"),
        only=BUNDLE,
        reason="a bundle is the one contract between export and run, and a board reads it with numpy and pydantic alone",
        remedy="move what needs the import to the side that has it (exporter/ or runners/)",
    ),
    Law(
        ("runners/*",),
        but_not=("runners/ort.py", "runners/tensorrt_library.py"),
        only=RUNNERS,
        reason="`pgx run` works where only the base is installed, and an engine is imported in its own file only",
        remedy="take arrays and names from the bundle's manifest, go through a Session, or do it in numpy",
    ),
    Law(
        ("runners/ort.py",),
        only=(*RUNNERS, "onnxruntime"),
        reason="this file holds one engine, ONNX Runtime, and runs where only the base and that are installed",
        remedy="give another engine its own file, and take what is missing from the bundle's manifest",
    ),
    Law(
        ("runners/tensorrt_library.py",),
        only=(*RUNNERS, "tensorrt", "tensorrt_rtx", "cuda"),
        reason="this file holds one engine, TensorRT, and runs where only the base and that are installed",
        remedy="give another engine its own file, and take what is missing from the bundle's manifest",
    ),
    Law(
        ("models/*",),
        never=("pgxport.exporter", "pgxport.calib", "pgxport.reporting", *EXPORT_TOOLS),
        reason="a model function is handed its `g`, so that tests can run it in plain numpy",
        remedy="call g.op, g.linear and g.weight; describe `g` by a Protocol in models/",
    ),
    Law(
        ("exporter/*",),
        never=("pgxport.calib",),
        reason="calib/ is the pipeline of one command; an export reads its file, or gathers statistics by what activations/ has",
        remedy="read the calibration file, or move what both need to activations/",
    ),
    Law(
        ("*",),
        but_not=("cluster/pool.py",),
        never=("ray",),
        reason="one file knows how a cluster is spoken to, and everything works without it (docs/decisions/0019)",
        remedy="give pgxport.cluster.pool a WorkerSetup",
    ),
    Law(
        ("*",),
        but_not=("reporting/transformers_subject.py",),
        never=REFERENCE,
        reason="export, calibrate and run work without the reference, which costs 2.3 s to import and gigabytes to install",
        remedy="use numpy and pgxport.models; the reference belongs to reporting/transformers_subject.py",
    ),
    Law(
        ("cli/*", "terminal.py"),
        only=(
            "click",
            "pgxport.cli",
            "pgxport.terminal",
            "pgxport.errors",
            "pgxport.text",
            "pgxport.interrupts",
            "pgxport.__version__",
        ),
        at_module_level=True,
        reason="`pgx --help` takes under 150 ms, and a command must not fail for an extra that it does not use",
        remedy="import it inside the command",
    ),
    Law(
        ("__init__.py",),
        only=("pgxport.errors",),
        at_module_level=True,
        reason="importing any part of pgxport imports this file, so whatever it loads `pgx --help` and `pgx run` load too",
        remedy="export the name from a module-level __getattr__",
    ),
    Law(
        ("*",),
        never=("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
        reason="loading a pickle runs code from it, and bundles and checkpoints come from strangers",
        remedy="use safetensors, npz with allow_pickle=False, or JSON",
    ),
    Law(
        ("*",),
        never=("cv2", "plotly", "jtop", "ultralytics", "pycocoevalcap"),
        reason="it is AGPL, needs Java, or doubles what pgx has (docs/decisions/)",
        remedy="use Pillow for images, altair for charts, sysfs for boards, pycocotools for boxes",
    ),
)


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    at_module_level: bool


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    """
    >>> is_in("onnx_ir.passes", ("onnx",)), is_in("onnx.helper", ("onnx",))
    (False, True)
    """
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports of a module in `package`, names of `from x import y` and importlib's constants too."""

    def walk(node: ast.AST, *, top: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(a.name, node.lineno, top) for a in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                # Only names of pgxport may be modules; `from numpy import array` imports numpy.
                inside = base == "pgxport" or base.startswith("pgxport.")
                yield from (Import(f"{base}.{a.name}" if inside else base, node.lineno, top) for a in names)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield Import(node.args[0].value, node.lineno, top)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                # Loaded by the type checker only; it still says who knows whom.
                for child in node.body:
                    yield from walk(child, top=False)
                for child in node.orelse:
                    yield from walk(child, top=top)
                return
        deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top=top and not deeper)

    yield from walk(ast.parse(source), top=True)


def violations(root: Path) -> list[str]:
    """One line for each import under the package folder `root` that breaks a law, with the remedy."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        package = ".".join(["pgxport", *Path(file).parent.parts])
        laws = [law for law in LAWS if law.covers(file)]
        for i in imports(path.read_text(encoding="utf-8"), package):
            for law in laws:
                if law.breaks(i.name) and (i.at_module_level or not law.at_module_level):
                    found.append(f"pgxport/{file}:{i.line} imports {i.name!r}: {law.reason}; {law.remedy}")
            if upwards(file, i.name):
                found.append(
                    f"pgxport/{file}:{i.line} imports {i.name!r}: imports go down the list RANKS; move what both need below"
                )
        if file not in ("__init__.py", "__main__.py") and place(file) not in RANKS:
            found.append(f"pgxport/{file}:1 is in {place(file)!r}, which has no rank; add it to RANKS")
    return found


def place(path: str) -> str:
    """A file's folder in the package, or its own name where it is in the root.

    >>> place("models/tiny/scenes.py"), place("errors.py")
    ('models', 'errors')
    """
    return path.partition("/")[0].removesuffix(".py")


def upwards(file: str, name: str) -> bool:
    """Whether a file imports something of the package that does not rank below its own place."""
    parts, here = name.split("."), place(file)
    if parts[0] != "pgxport" or len(parts) < 2 or parts[1] not in RANKS or here not in RANKS or parts[1] == here:
        return False
    return RANKS.index(parts[1]) > RANKS.index(here)


def package_root() -> Path:
    """The package that is being tested: the source tree, or the installed wheel."""
    spec = importlib.util.find_spec("pgxport")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[1] / "pgxport"


def modules_after(statement: str, *args: str) -> set[str]:
    """The modules that a fresh interpreter has loaded once `statement` has run, which must succeed."""
    code = f"import json, sys\ntry:\n    {statement}\nfinally:\n    sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{statement} {args}: exit {done.returncode}\n{done.stderr}"
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_nobody_imports_what_the_table_forbids():
    found = violations(package_root())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("bundle/reader.py", "import onnx", "onnx"),
        ("bundle/reader.py", "from pgxport.models.spec import ModelSpec", "pgxport.models.spec.ModelSpec"),
        ("errors.py", "import click", "click"),
        ("runners/loop.py", "def f():\n    import onnxruntime", "onnxruntime"),
        ("runners/runner.py", "from pgxport import exporter", "pgxport.exporter"),
        ("runners/runner.py", "from ..models import spec", "pgxport.models.spec"),
        ("runners/runner.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx_ir", "onnx_ir"),
        ("runners/deep/er.py", "from ...exporter.graph import g", "pgxport.exporter.graph.g"),
        ("runners/ort.py", "import tensorrt", "tensorrt"),
        ("runners/tensorrt.py", "import onnxruntime", "onnxruntime"),
        ("models/gemma.py", "from pgxport.exporter.graph import GraphBuilder", "pgxport.exporter.graph.GraphBuilder"),
        ("models/gemma.py", "import onnx_ir as ir", "onnx_ir"),
        ("models/tiny/train.py", "def f():\n    import torch.nn", "torch.nn"),
        ("exporter/export.py", "from pgxport.calib import ranges", "pgxport.calib.ranges"),
        ("exporter/export.py", "def f():\n    from transformers import AutoModel", "transformers"),
        ("reporting/asking.py", "class A:\n    import torch", "torch"),
        ("exporter/check/parity.py", "try:\n    import torch\nexcept ImportError:\n    pass", "torch"),
        ("calib/ranges.py", "import importlib\nimportlib.import_module('torch')", "torch"),
        ("cli/run.py", "import numpy", "numpy"),
        ("terminal.py", "import rich", "rich"),
        ("text.py", "def f():\n    import numpy", "numpy"),
        ("cli/run.py", "from pgxport.runners import Runner", "pgxport.runners.Runner"),
        ("__init__.py", "from .bundle.reader import Bundle", "pgxport.bundle.reader.Bundle"),
        ("reporting/page.py", "def f():\n    import pickle", "pickle"),
        ("reporting/page.py", "import plotly.express", "plotly.express"),
        ("exporter/export.py", "def f():\n    from pgxport.tuning.search import front", "pgxport.tuning.search.front"),
        ("metrics/sample.py", "from pgxport.data.loader import load", "pgxport.data.loader.load"),
        ("activations/steps.py", "from pgxport.exporter.stream import ahead", "pgxport.exporter.stream.ahead"),
        ("files.py", "from pgxport import bundle", "pgxport.bundle"),
        ("attic/old.py", "import json", "attic"),
        ("reporting/cluster_pass.py", "def f():\n    import ray", "ray"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, name: str):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"import json\n{source}\n", encoding="utf-8")
    found = violations(tmp_path)
    assert found, f"{file}: {source!r} went unnoticed"
    assert all(line.startswith(f"pgxport/{file}:") and repr(name) in line for line in found)


def test_every_path_that_a_law_or_pyproject_names_exists():
    root = package_root()
    named = [file for law in LAWS for file in (*law.files, *law.but_not)]
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        ignored = tomllib.loads(project.read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
        named += [file.removeprefix("pgxport/") for file in ignored if file.startswith("pgxport/")]
        if (project.parent / "tools").is_dir():  # the wheel is tested with tests/ alone
            assert all(list(project.parent.glob(file)) for file in ignored if not file.startswith("pgxport/"))
    assert [file for file in named if not list(root.glob(file))] == []
    assert [name for name in RANKS if not (root / name).is_dir() and not (root / f"{name}.py").is_file()] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("bundle/reader.py", "import numpy as np\nfrom pydantic import BaseModel\nfrom pgxport.errors import IntegrityError"),
        ("runners/image.py", "from PIL import Image\nfrom pgxport.bundle.reader import Bundle\nfrom . import loop"),
        ("runners/ort.py", "import onnxruntime as ort"),
        ("runners/tensorrt_library.py", "import tensorrt\nfrom cuda import cudart"),
        ("models/checkpoint.py", "import ml_dtypes\nfrom safetensors import safe_open"),
        ("reporting/transformers_subject.py", "def f():\n    import torch\n    import transformers"),
        ("exporter/check/parity.py", "from pgxport.metrics.fidelity import kl_divergence"),
        ("cli/run.py", "import click\nfrom pgxport.errors import PgxError\ndef f():\n    import onnx_ir"),
        (
            "__init__.py",
            "from pgxport.errors import PgxError\ndef __getattr__(name):\n    from pgxport.bundle.reader import Bundle",
        ),
    ],
)
def test_an_import_the_design_allows_is_not_reported(tmp_path: Path, file: str, source: str):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{source}\n", encoding="utf-8")
    assert violations(tmp_path) == []


# What the table says file by file, tried on the whole: these hold only if nothing in between imports more.


@pytest.mark.skipif(not (package_root() / "runners" / "__init__.py").exists(), reason="pgxport.runners is not written yet")
def test_importing_the_runners_loads_no_export_tool():
    assert not modules_after("import pgxport.runners") & set(EXPORT_TOOLS)


@pytest.mark.skipif(not (package_root() / "cli").is_dir(), reason="pgxport.cli is not written yet")
def test_importing_the_command_line_loads_nothing_heavy():
    heavy = {"numpy", "pydantic", "PIL", "tokenizers", "onnxruntime", "rich", *EXPORT_TOOLS}
    assert not modules_after("import pgxport.cli") & heavy


@pytest.mark.skipif("PGX_TEST_BUNDLES" not in os.environ, reason="PGX_TEST_BUNDLES is not set (make test-wheel sets it)")
def test_pgx_run_loads_no_export_tool(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("onnxruntime")
    image.new("RGB", (112, 112), "red").save(tmp_path / "red.png")
    manifests = sorted(Path(os.environ["PGX_TEST_BUNDLES"]).glob("*/manifest.json"))
    assert manifests, f"PGX_TEST_BUNDLES={os.environ['PGX_TEST_BUNDLES']}: holds no */manifest.json"
    args = ("run", str(manifests[0].parent), "--image", str(tmp_path / "red.png"), "--prompt", "caption en")
    loaded = modules_after("from pgxport.cli import main; main()", *args)
    assert "onnxruntime" in loaded, "the run did not reach the engine, so it shows nothing"
    assert not loaded & set(EXPORT_TOOLS)
