"""A client that fights for a sequence: two of them take it from each other, again and again.

    python -m tests.chaos.rival FOLDER

Each adds a number of its own to the sum, so every output tells how many steps of each
rival it contains. What comes back is journaled as lines of (step, output).
"""

import asyncio
import random
import sys
from pathlib import Path

from sluice_client import AsyncClient, Fenced, Mode, SluiceError, Unavailable
from tests.chaos.client import RECONNECT_SECONDS_MAX
from tests.chaos.task import Task
from tests.chaos.verdict import RIVAL_ADDENDS, RIVAL_STEPS_MAX


async def run(folder: Path) -> None:
    """Take the sequence, add some steps, and again, until told to stop."""
    task = Task.read(folder)
    draw = random.Random(f"{task.seed} {task.client}")
    claims = folder / "claims"
    async with AsyncClient(task.addresses, reconnect_seconds_max=RECONNECT_SECONDS_MAX) as client:
        while not (folder / "stop").exists():
            try:
                if not await _take(client, task, claims, draw):
                    return
            except (Fenced, Unavailable):
                pass
            except SluiceError as error:
                (folder / "error").write_text(f"{type(error).__name__}: {error}")
                return
            await asyncio.sleep(draw.expovariate(1 / (10 * task.pause_seconds)))


async def _take(client: AsyncClient, task: Task, claims: Path, draw: random.Random) -> bool:
    """One time of having it; False when it is long enough. Raises Fenced when it is taken away."""
    sequence = client.sequence("accumulator", f"{task.seed}-rivals", mode=Mode.START_OR_RESUME)
    await sequence.open()
    for _ in range(draw.randint(1, 12)):
        steps = draw.choice([1, 1, 5])
        step = sequence.step_count
        if step + steps > RIVAL_STEPS_MAX:
            await sequence.park()
            return False
        outputs = await sequence.step([[RIVAL_ADDENDS[task.client]]] * steps)
        with claims.open("a") as file:
            file.writelines(f"{step + k} {int(y[0])}\n" for k, y in enumerate(outputs))
        await asyncio.sleep(draw.expovariate(1 / task.pause_seconds))
    if draw.random() < 0.5:
        await sequence.park()
    return True


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
