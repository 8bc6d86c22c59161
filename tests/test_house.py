# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: how large things may be, one name for one thing, and no command that does not exist.

Raising a number needs a page in docs/decisions/. Who may import whom is test_imports.py's; ruff's SLF001 keeps underscore names private.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "tools" / "structure.py").exists():
    pytest.skip("the wheel is tested without the repository", allow_module_level=True)

sys.path.insert(0, str(ROOT / "tools"))
from structure import CORE, ROOMS  # noqa: E402

PACKAGE = ROOT / "pgxport"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE_LINES, FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 4600, 400, 50, 20
# `pgx WORD` where a reader would type it: in backticks, at the beginning of an indented or fenced line, or after one of these words.
COMMAND = re.compile(r"(?:`|^[ \t]*|\b(?:try:|run|runs) |&& )pgx (?P<word>[a-z]+)(?![\w-])", re.MULTILINE)
FORMAT = "calibration"  # `pgx calibration` is what a calibration file calls its format
PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*")] if "report-tiny" not in p.parts
)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_the_core_is_read_in_an_afternoon():
    assert sum(lines(PACKAGE / file) for file in CORE) <= CORE_LINES


def test_a_file_is_read_in_one_sitting():
    assert {name(f): lines(f) for f in FILES if lines(f) > FILE_LINES} == {}


def test_a_function_is_seen_whole():
    long = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                long |= {f"{name(file)}: {node.name}": length} if length > FUNCTION_LINES else {}
    assert long == {}


def test_a_folder_has_few_files():
    of_folder: dict[str, int] = defaultdict(int)
    for file in FILES:
        of_folder[name(file.parent)] += file.name != "__init__.py"
    assert {folder: count for folder, count in of_folder.items() if count > FOLDER_FILES} == {}


def test_every_room_is_described():
    assert {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE} == set(ROOMS) - {""}


def test_a_class_name_exists_once():
    places = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name(file))
    assert {cls: files for cls, files in places.items() if len(files) > 1} == {}


def tables(source: str) -> Iterator[tuple[int, bool]]:
    """Each line with `fmt: skip`, and whether what ends there is a table: a literal, a constant of the module, or what a loop goes over."""
    tree = ast.parse(source)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for number, line in enumerate(source.splitlines(), 1):
        if line.rstrip().endswith("# fmt: skip"):
            ending = [s for s in statements if s.end_lineno == number]
            statement = max(ending, key=lambda s: s.lineno) if ending else None
            over = [s.iter for s in statements if isinstance(s, ast.For) and s.iter.end_lineno == number]
            value = over[0] if over else getattr(statement, "value", None)
            while isinstance(value, ast.BinOp):  # {...} | {...}
                value = value.right
            constant = statement in tree.body and isinstance(statement, ast.Assign | ast.AnnAssign)
            yield number, constant or isinstance(value, ast.Dict | ast.List | ast.Tuple | ast.Set)


def test_only_tables_are_kept_from_the_formatter():
    found = [f"{name(f)}:{number}" for f in FILES for number, table in tables(f.read_text()) if not table]
    assert found == []


@pytest.mark.parametrize(
    ("source", "table"),
    [
        ("def f():\n return {\n 1: 2 }  # fmt: skip", True),
        ("A = f(\n 1)  # fmt: skip", True),
        ("for x in (\n 1, 2,\n):  # fmt: skip\n pass", True),
        ("f(\n 1)  # fmt: skip", False),
        ("def f():\n return g(\n 1)  # fmt: skip", False),
    ],
)
def test_a_table_is_a_literal_a_constant_or_what_a_loop_goes_over(source, table):
    assert [ok for _, ok in tables(source)] == [table]


def commands_named(text: str) -> set[str]:
    """
    >>> sorted(commands_named("`pgx export` writes bundles, and pgx reads them; run pgx verify"))
    ['export', 'verify']
    """
    return {found["word"] for found in COMMAND.finditer(text)}


def strings(file: Path) -> Iterator[str]:
    """All strings of a Python file, f-strings with their holes left out."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value if "\n" in node.value else f"… {node.value}"  # a part of a message does not begin a line


def test_every_command_that_a_text_names_exists():
    from pgxport.cli import cli

    found = {name(page): commands_named(page.read_text()) - set(cli.commands) - {FORMAT} for page in PAGES}
    for file in FILES:
        found[name(file)] = {word for text in strings(file) for word in commands_named(text)} - set(cli.commands) - {FORMAT}
    assert {file: words for file, words in found.items() if words} == {}
