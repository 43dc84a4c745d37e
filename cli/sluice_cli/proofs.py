"""Shows proofs: a progress bar while they are made, then a table of their figures."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sluice_cli.failure import fail

if TYPE_CHECKING:
    from sluice_protos.contract_pb2 import Proof


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Show a bar on standard error; call the yielded function to move it. Ends on ExportError."""
    from sluice_export import ExportError

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=sys.stderr, markup=False, highlight=False)
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading", total=1.0)
            yield lambda what, share: bar.update(task, description=what, completed=share)
    except ExportError as error:
        fail(str(error))


def show_proofs(title: str, proofs: "Iterable[Proof]") -> None:
    """Print a table of proofs and their figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("proof")
    table.add_column("figure", justify="right")
    table.add_column("ulps", justify="right")
    table.add_column("what was compared", overflow="fold")
    for proof in proofs:
        mark = "" if proof.passed else " (does not hold)"
        table.add_row(proof.name, f"{proof.figure:.2g}{mark}", f"{proof.ulps:.0f}", proof.detail)
    Console(markup=False, highlight=False).print(table)
