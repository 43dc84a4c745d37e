"""A client that writes its outputs to a journal, and can be killed: `… ADDRESS JOURNAL DURABILITY`.

The first line of the journal is the ticket; each further one is an output. The input
of step k is k. It never ends by itself.
"""

import sys
from pathlib import Path

from sluice_client import Client


def main(address: str, journal: Path, durability: str) -> None:
    client = Client(address)
    sequence = client.sequence(
        "accumulator", f"journal-{durability}", durability=durability, holds_outputs=True
    )
    with client, sequence, journal.open("a", buffering=1) as file:
        file.write(sequence.ticket().to_json() + "\n")
        inputs = ([step] for step in range(10**9))
        for step, y in enumerate(sequence.stream(inputs, ahead=32)):
            file.write(f"{y.item():.0f}\n")
            sequence.confirm(step + 1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
