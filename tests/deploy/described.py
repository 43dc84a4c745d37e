"""Kubernetes objects as the Python packages of their makers describe them, read and not imported.

Both packages are written by the OpenAPI Generator: a class for each kind of object, with
the types of its fields (`openapi_types`), their names in YAML (`attribute_map`), and a
setter that refuses None for those that must be there.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = {"str": str, "bool": bool, "int": int, "float": (int, float)}
# What has no type of Python's own: numbers or text, told apart by what reads them.
FREE = {"object", "datetime", "ResourceQuantity"}


@dataclass(frozen=True)
class Kind:
    """One kind of object."""

    fields: dict[str, str]  # the name in YAML to the type
    required: frozenset[str]


class Packages:
    """The kinds of objects that unpacked packages describe."""

    def __init__(self, folder: Path) -> None:
        self._modules: dict[str, str] = {}
        for path in folder.glob("**/models/*.py"):
            text = path.read_text()
            if found := re.search(r"^class (\w+)\(", text, re.MULTILINE):
                self._modules[found[1]] = text
        self._kinds: dict[str, Kind] = {}

    def misfits(self, value: Any, kind: str, where: str = "") -> Iterator[str]:
        """Every place where `value` is not what the description of `kind` says."""
        if listed := re.fullmatch(r"list\[(.+)\]", kind):
            yield from self._each(value, list, listed[1], where)
        elif mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
            yield from self._each(value, dict, mapped[1], where)
        elif kind in SCALARS:
            is_flag = isinstance(value, bool) and kind != "bool"
            if is_flag or not isinstance(value, SCALARS[kind]):
                yield f"{where} is {value!r}, not {kind}"
        elif kind not in FREE:
            yield from self._fields(value, kind, where)

    def _each(self, value: Any, shape: type, kind: str, where: str) -> Iterator[str]:
        if not isinstance(value, shape):
            yield f"{where} is {value!r}, not a {shape.__name__}"
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from self.misfits(item, kind, f"{where}.{key}")

    def _fields(self, value: Any, kind: str, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, not a {kind}"
            return
        if kind not in self._kinds:
            self._kinds[kind] = read(self._modules[kind])
        described = self._kinds[kind]
        yield from (f"{where} wants {name}" for name in described.required - set(value))
        for name, item in value.items():
            if name in described.fields:
                yield from self.misfits(item, described.fields[name], f"{where}.{name}")
            else:
                yield f"{where} knows no {name}"


def read(module: str) -> Kind:
    """The kind that the text of a module describes."""
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    types, names = literals["openapi_types"], literals["attribute_map"]
    required = re.findall(r"Invalid value for `(\w+)`, must not be `None`", module)
    return Kind(
        {names[field]: kind for field, kind in types.items()},
        frozenset(names[field] for field in required),
    )
