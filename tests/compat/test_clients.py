"""Clients that others have written, unchanged, each in a process of its own.

They bring their own definition of the package `inference`, and a process can hold one.
"""

import asyncio
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "clients"


@pytest.mark.parametrize("name", ["blocking", "streaming", "asynchronous"])
async def test_a_client_of_the_field_works_unchanged(served, name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        CLIENTS / f"{name}.py",
        served.address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(100):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert output.decode().split()[-1] == "done", output.decode()
