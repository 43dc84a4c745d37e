"""Long runs: round after round, each with its own seed, until time is up.

python -m tests.chaos --seconds 600 --seed 1 [--setting WORDS] [--report FILE]
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.report import write_report
from tests.chaos.rounds import Result, play
from tests.chaos.world import LIBRARY, PLAIN, RIVAL, THREADS, Models, Setting

# Limits that are met all the time.
TIGHT = ("--unacknowledged-steps-max", "9", "--undurable-steps-max", "50")

SETTINGS = [
    Setting("redis", "strict", servers=3),
    Setting("sqlite", "periodic", clients=(THREADS, PLAIN)),
    Setting("redis", "periodic", servers=2, is_march=True, holds_outputs=False),
    Setting("sqlite", "strict", processes=2),
    Setting("redis", "strict", servers=2, clients=(RIVAL, RIVAL), pause_seconds=0.01),
    Setting("redis", "periodic", servers=3, holds_outputs=False),
    Setting("sqlite", "strict", servers=2, clients=(THREADS, PLAIN)),
    Setting("redis", "strict", servers=2, is_march=True, clients=(THREADS, PLAIN)),
    Setting("redis", "periodic", processes=2),
    Setting("sqlite", "periodic", holds_outputs=False, flags=TIGHT),
    Setting("none", "off", clients=(LIBRARY, THREADS, PLAIN)),
]


def make_models(folder: Path) -> Models:
    """Write the files that are served."""
    import torch

    from sluice_export import export
    from tests.models import lstm_module, write_accumulator

    models = Models(folder / "accumulator.onnx", folder / "lstm.onnx")
    write_accumulator(models.accumulator)
    export(lstm_module(), torch.zeros(1, 5, 8), models.lstm, name="lstm")
    return models


def main() -> int:
    """Play rounds; 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--round-seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--setting", default="", help="only settings with these words")
    parser.add_argument("--report", type=Path, help="write the result into this page")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sluice-chaos-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    models = make_models(folder)
    settings = [each for each in SETTINGS if arguments.setting in each.name]
    result, began, number = Result(), time.monotonic(), 0
    while time.monotonic() - began < arguments.seconds:
        setting = settings[number % len(settings)]
        seed = arguments.seed * 1000 + number
        number += 1
        place = folder / f"round-{seed}"
        place.mkdir()
        one = play(setting, models, place, seed=seed, seconds=arguments.round_seconds)
        result.take(one)
        print(
            f"seed {seed}, {setting.name}: {one.seconds:.0f} s, {one.faults.total()} faults, "
            f"{one.verdict.sequences} sequences, {one.verdict.steps} steps, "
            f"{len(one.verdict.wrongs)} wrong",
            flush=True,
        )
        for words in one.verdict.wrongs[:5]:
            print(f"  {words}", flush=True)
    if arguments.report is not None:
        write_report(arguments.report, result, seconds=arguments.seconds, seed=arguments.seed)
    return 1 if result.verdict.wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
