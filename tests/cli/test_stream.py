"""`sluice stream` composes in a shell: rows in, rows out, as they come."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sluice_cli.main import make_app
from tests.client.server_process import ServerProcess

SLUICE = str(Path(sys.executable).with_name("sluice"))


@pytest.fixture(scope="module")
def server(accumulator_file, multi_file) -> Iterator[ServerProcess]:
    process = ServerProcess({"sum": accumulator_file, "multi": multi_file.path})
    yield process
    process.stop()


@pytest.fixture
def stream(server):
    """Run `sluice stream` over a text: what it printed, or CompletedProcess when it failed."""

    def run(text: str, *arguments: str, fails: bool = False):
        done = subprocess.run(
            [SLUICE, "stream", *arguments, "--address", server.address],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert bool(done.returncode) is fails, done.stderr
        return done if fails else done.stdout

    return run


def test_rows_of_csv_go_through_a_model(stream) -> None:
    assert stream("1\n2\n\n3.5\n", "sum") == "1.0\n3.0\n6.5\n"


def test_named_columns_come_in_any_order(stream) -> None:
    header = "tokens," + ",".join(f"features.{index}" for index in reversed(range(6)))
    named = stream(f"{header}\n3,6,5,4,3,2,1\n", "multi")
    plain = stream("1,2,3,4,5,6,3\n", "multi")
    names, row = named.splitlines()
    assert names == "scores.0,scores.1,scores.2,scores.3,scores.4,choice"
    assert row == plain.strip()


def test_rows_of_json_go_through_a_model(stream) -> None:
    assert stream("[1]\n[2]\n", "sum", "--format", "jsonl") == "[1.0]\n[3.0]\n"
    line = json.dumps({"features": [1, 2, 3, 4, 5, 6], "tokens": 3})
    answer = json.loads(stream(line, "multi", "--format", "jsonl"))
    assert answer.keys() == {"scores", "choice"}
    assert isinstance(answer["choice"], int)


def test_each_key_has_a_sequence_of_its_own(stream, tmp_path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("device,x\na,1\nb,10\na,2\nb,20\n")
    assert stream("", "sum", "--input", str(file), "--key", "device") == (
        "device,y\na,1.0\nb,10.0\na,3.0\nb,30.0\n"
    )
    lines = '{"k": 7, "x": [1]}\n{"k": 8, "x": [5]}\n{"k": 7, "x": [1]}\n'
    answers = stream(lines, "sum", "--format", "jsonl", "--key", "k").splitlines()
    assert [json.loads(line)["y"] for line in answers] == [[1.0], [5.0], [2.0]]


def test_a_named_sequence_goes_on_with_the_next_command(stream) -> None:
    assert stream("1\n", "sum", "--id", "long") == "1.0\n"
    assert stream("1\n", "sum", "--id", "long") == "2.0\n"


def test_each_output_comes_before_the_next_row_is_written(server) -> None:
    process = subprocess.Popen(
        [SLUICE, "stream", "sum", "--address", server.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    for total in ("1.0", "2.0", "3.0"):
        process.stdin.write("1\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == total
    process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("1\n2\n3,4\n", ["sum"], "row 3: 2 values; the model takes 1"),
        ("1\nx\n", ["sum"], "row 2: x is not x: float32 [1]"),
        ("1\nnan\n", ["sum"], "row 2: "),
        ("z\n1\n", ["sum"], "row 1: no column 'x' among z"),
        ("1\n", ["sum", "--key", "device"], "row 1: --key needs a first line"),
        ("[1\n", ["sum", "--format", "jsonl"], "row 1: is not JSON"),
        ("[1, 2]\n", ["sum", "--format", "jsonl"], "takes float32 [1]"),
        ("[1]\n", ["multi", "--format", "jsonl"], "is not an object with 'features', 'tokens'"),
        ("y,x\n1,2\n", ["sum", "--key", "y"], "--key 'y' is also the name of an output"),
        ("1\n", ["nothing"], "nothing"),
        ("", ["sum", "--input", "no-such-file.csv"], "no-such-file.csv"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(server, tmp_path, text, arguments, message) -> None:
    file = tmp_path / "rows"
    file.write_text(text)
    command = ["stream", "--address", server.address, "--input", str(file), *arguments]
    done = CliRunner().invoke(make_app(), command)
    assert message in done.stderr
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)


def test_a_mark_in_front_of_utf_8_is_no_part_of_the_first_row(stream, tmp_path) -> None:
    assert stream("\ufeffx\n1\n", "sum") == "y\n1.0\n"
    file = tmp_path / "rows.csv"
    file.write_text("1\n2\n", encoding="utf-8-sig")
    assert stream("", "sum", "--input", str(file)) == "1.0\n3.0\n"


@pytest.mark.parametrize("text", ["1\n2\n3,\u00e9\n", "\u00e9\n"])
def test_bytes_that_are_not_utf_8_end_the_command_with_their_row(server, tmp_path, text) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text, encoding="latin-1")
    command = [SLUICE, "stream", "sum", "--address", server.address]
    number = text.count("\n")
    for arguments, source in ((["--input", str(file)], None), ([], file.read_bytes())):
        done = subprocess.run(
            [*command, *arguments], input=source, capture_output=True, check=False, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr.decode().startswith(f"row {number}: is not UTF-8; convert it")
        assert done.stdout == b"1.0\n3.0\n"[: 4 * (number - 1)]


def test_rows_before_a_bad_one_are_answered(stream) -> None:
    done = stream("1\n2\nbad\n", "sum", fails=True)
    assert done.stdout == "1.0\n3.0\n"


def test_a_reader_that_has_had_enough_is_no_error(server) -> None:
    line = f"yes 1 | {SLUICE} stream sum --address {server.address} | head -n 3"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n2.0\n3.0\n"
    assert done.stderr == ""
