"""The examples of docs/client.md run as they stand."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_guides_examples_run(number: int, server) -> None:
    code = EXAMPLES[number]
    assert '"127.0.0.1:8001"' in code
    exec(
        compile(code.replace("127.0.0.1:8001", server.address), f"{GUIDE}:{number}", "exec"),
        {"__name__": "guide"},
    )


def test_the_guide_has_examples() -> None:
    assert len(EXAMPLES) >= 5
