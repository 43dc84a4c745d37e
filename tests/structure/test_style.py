"""The rules of style that no linter knows."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
# Each is written so that this file does not contain it.
FORBIDDEN = {
    "type: " + "ignore": "give it its type",
    "NotImplemented" + "Error": "finish it or leave it out",
    "mark." + "skip": "a test that is skipped is not a test",
    "pytest." + "skip": "a test that is skipped is not a test",
    "import" + "orskip": "a test that is skipped is not a test",
    "mark." + "xfail": "mend it or leave it out",
    "/work" + "/": "the project knows no machine",
}


def text_files(root: Path) -> dict[str, str]:
    """Every text file written by hand that is in git, or would be."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listing, cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    files = {}
    for name in names:
        if (root / name).is_file() and "_pb2" not in name:
            try:
                files[name] = (root / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
    return files


def test_every_module_says_in_one_sentence_what_it_is_for(modules: dict[str, Path]) -> None:
    wrong = []
    for module, path in modules.items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = docstring.split("\n\n")[0]
        if not re.fullmatch(r"[^\n].*[.:]", first, flags=re.DOTALL) or re.search(
            r"\. [A-Z]", first
        ):
            wrong.append(module)
    assert wrong == []


def test_every_module_is_called_by_what_it_is(modules: dict[str, Path]) -> None:
    assert [name for name in modules if EMPTY_NAMES & set(name.split("."))] == []


@pytest.mark.parametrize("words", FORBIDDEN)
def test_nothing_is_left_undone(words: str, root: Path) -> None:
    found = [name for name, text in text_files(root).items() if words in text]
    assert found == [], FORBIDDEN[words]


def test_no_constructor_takes_ten_collaborators(modules: dict[str, Path]) -> None:
    crowded = [
        f"{module}.{definition.name}"
        for module, path in modules.items()
        for definition in ast.walk(ast.parse(path.read_text()))
        if isinstance(definition, ast.ClassDef)
        for method in definition.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        # Without `self`; values such as limits are named, and do not count.
        if len(method.args.args) - 1 >= 10
    ]
    assert crowded == []
