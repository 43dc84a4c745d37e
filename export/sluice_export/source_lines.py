"""Names places in the user's source code, for messages that point at the line to change."""

from pathlib import Path


def is_user_file(filename: str) -> bool:
    """Whether a source file is the user's own and not a library's."""
    parts = Path(filename).parts
    return not {"site-packages", "dist-packages", "sluice_export"} & set(parts) and not (
        filename.startswith("<")
    )


def describe_line(operation: str, file: str, line: int | str, code: str) -> str:
    """An operation and the line that calls it, such as `mean in train.py, line 17: y.mean(1)`."""
    return f"{operation} in {Path(file).name}, line {line}: {code}"
