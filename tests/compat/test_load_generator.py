"""The field's load generator, Triton's perf_analyzer, measures a server unchanged."""

import asyncio
import csv
import shutil
from pathlib import Path

import pytest

REQUESTS = 200


@pytest.fixture
def program() -> str:
    found = shutil.which("perf_analyzer")
    if found is None:
        pytest.fail("this test starts Triton's perf_analyzer: `make tools` fetches it")
    return found


@pytest.mark.parametrize("streaming", [True, False])
async def test_the_load_generator_of_the_field_measures_sequences(
    program, sums, tmp_path: Path, streaming: bool
) -> None:
    served = await sums()
    report = tmp_path / "report.csv"
    process = await asyncio.create_subprocess_exec(
        program,
        *("-m", "accumulator", "-u", served.address, "-i", "grpc"),
        *(["--streaming"] if streaming else ["--async"]),
        *("--sequence-length", "10", "--concurrency-range", "4"),
        # So many, however long they take.
        *("--request-count", str(REQUESTS), "-f", str(report)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(100):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    (row,) = csv.DictReader(report.read_text().splitlines())
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) > 0
    assert served.metric("sluice_steps_total", model="accumulator") >= REQUESTS
    # Its sequences were sequences: begun some of the time, and none refused.
    opened = served.metric("sluice_sequences_opened_total", model="accumulator", origin="create")
    assert 10 <= opened < REQUESTS
    faults = served.server.metrics.faults.collect()
    assert not [sample for family in faults for sample in family.samples]
