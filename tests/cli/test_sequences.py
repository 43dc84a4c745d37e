"""`sluice sequences`: what lives at a server can be seen, copied and dropped from a shell."""

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from sluice_cli.main import make_app
from sluice_client import Client, Mode, SequenceNotFound
from tests.client.server_process import ServerProcess


@pytest.fixture(scope="module")
def server(accumulator_file) -> Iterator[ServerProcess]:
    process = ServerProcess({"sum": accumulator_file})
    yield process
    process.stop()


@pytest.fixture
def client(server) -> Iterator[Client]:
    """With one sequence, `mine`, that has the sum 3 after 2 steps."""
    with Client(server.address) as client, client.sequence("sum", "mine") as sequence:
        sequence.step([[1], [2]])
        yield client


@pytest.fixture
def sequences(server):
    """Run `sluice sequences …`: what it printed, or the error when it failed."""

    def run(*arguments: str, fails: bool = False) -> str:
        done = CliRunner().invoke(
            make_app(), ["sequences", *arguments, "--address", server.address]
        )
        assert bool(done.exit_code) is fails, done.output
        return done.stderr if fails else done.stdout

    return run


def test_the_list_has_a_row_for_each_sequence(client, sequences) -> None:
    with client.sequence("sum", "another") as another:
        another.park()
        rows = [line.split("│")[1:-1] for line in sequences("list").splitlines() if "│" in line]
        found = [[cell.strip() for cell in row] for row in rows]
    assert [row[:3] + row[4:5] for row in found] == [
        ["sum", "another", "0", "parked"],
        ["sum", "mine", "2", "attached"],
    ]
    client.close_sequence("sum", "another")


def test_the_list_is_there_for_programs(client, sequences) -> None:
    (fact,) = json.loads(sequences("list", "sum", "--json"))
    assert fact["sequence_id"] == "mine"
    assert (fact["step"], fact["is_parked"]) == (2, False)


def test_an_empty_list_says_so(sequences) -> None:
    assert "there are no live sequences" in sequences("list")
    assert json.loads(sequences("list", "--json")) == []


def test_one_sequence_is_shown_with_its_state(client, sequences) -> None:
    text = sequences("show", "sum", "mine")
    assert "mine" in text
    assert "1 floats from 3 to 3" in text
    facts = json.loads(sequences("show", "sum", "mine", "--json"))
    assert (facts["step"], facts["state"]) == (2, [3.0])


def test_a_copy_goes_on_by_itself(client, sequences) -> None:
    assert sequences("fork", "sum", "mine", "--to", "copy") == "copy\n"
    drawn = sequences("fork", "sum", "mine").strip()
    assert drawn not in ("", "mine", "copy")
    for name in ("copy", drawn):
        with client.sequence("sum", name, mode=Mode.TAKEOVER) as copy:
            assert copy.step([10]).tolist() == [13]
    error = sequences("fork", "sum", "mine", "--to", "mine", fails=True)
    assert "alive" in error


def test_a_sequence_is_dropped(client, sequences) -> None:
    client.fork("sum", "mine", "gone")
    assert sequences("close", "sum", "gone") == "closed after 2 steps\n"
    with pytest.raises(SequenceNotFound):
        client.sequence("sum", "gone", mode=Mode.TAKEOVER).open()


@pytest.mark.parametrize("command", ["show", "close", "fork"])
def test_a_sequence_that_does_not_live_is_an_error_of_one_line(sequences, command) -> None:
    error = sequences(command, "sum", "nobody", fails=True)
    assert error.startswith("error: sequence 'nobody'")
    assert error.count("\n") == 1


def test_an_unknown_model_is_an_error_of_one_line(sequences) -> None:
    error = sequences("list", "other", fails=True)
    assert "there are: sum" in error
