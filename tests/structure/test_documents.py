"""What the documents point at exists."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.main import get_command

from sluice_cli.main import make_app
from sluice_service.metrics import Metrics
from sluice_service.settings import Settings


def documents(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives to the headings."""
    headings = re.findall(r"^#+ +(.+)$", without_code(text), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_every_relative_link_leads_somewhere(root: Path) -> None:
    broken = []
    for document in documents(root):
        text = without_code(document.read_text())
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
        for link in links:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = document.parent / name if name else document
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken.append(f"{document.name}: {link}")
    assert broken == []


def test_every_make_target_that_is_named_exists(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target
        for document in documents(root)
        for target in re.findall(r"\bmake ([a-z][a-z-]+)(?=`|$| +#)", document.read_text(), re.M)
    }
    assert named
    assert named <= targets


def test_every_sluice_command_that_is_named_exists(root: Path) -> None:
    commands = set(get_command(make_app()).commands)
    named = {
        command
        for document in documents(root)
        for command in re.findall(
            r"(?:`|^|\| |\$ )sluice ([a-z][a-z-]*)", document.read_text(), re.M
        )
    }
    assert named
    assert named <= commands


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_documents_people_look_for_are_there(name: str, root: Path) -> None:
    assert (root / name).is_file()


def test_the_operations_page_has_every_metric_and_no_other(root: Path) -> None:
    page, _ = Metrics().expose("")
    exposed = set(re.findall(r"^# TYPE (sluice_\w+) ", page.decode(), flags=re.MULTILINE))
    text = (root / "docs" / "operations.md").read_text()
    told = set(re.findall(r"^\| `(sluice_\w+)`", text, flags=re.MULTILINE))
    assert told == exposed


def test_every_query_on_the_operations_page_asks_for_a_metric_it_tells_of(root: Path) -> None:
    text = (root / "docs" / "operations.md").read_text()
    told = set(re.findall(r"^\| `(sluice_\w+)`", text, flags=re.MULTILINE))
    (queries,) = re.findall(r"^```promql\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    asked = {
        re.sub(r"_(sum|count|bucket)$", "", name) for name in re.findall(r"sluice_\w+", queries)
    }
    assert asked
    assert asked <= told


def test_every_setting_that_is_named_exists(root: Path) -> None:
    text = (root / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(\w+_(?:max|seconds))`", text))
    named = {name for name in named if not name.startswith("sluice_")}
    assert len(named) > 5
    assert named <= set(Settings.model_fields)


def test_the_map_of_the_tests_names_every_file_once_and_no_other(root: Path) -> None:
    _, _, section = (root / "CONTRIBUTING.md").read_text().partition("## Where the tests are")
    named = re.findall(r"`([\w/]*test_\w+\.py)`", section.split("\n## ")[0])
    there = [path.relative_to(root / "tests") for path in (root / "tests").rglob("test_*.py")]
    assert sorted(named) == sorted(map(str, there))
