"""Builds the parts that store one model's sequences, and connects them with those that serve."""

from typing import NamedTuple

from sluice_service.batching.versions import Versions
from sluice_service.durability.checkpointer import Checkpointer
from sluice_service.durability.ownership import Ownership
from sluice_service.durability.pending import Pending
from sluice_service.durability.snapshots import Snapshots
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission
from sluice_service.serving.attachments import Attachments
from sluice_service.serving.landing import Landing
from sluice_service.serving.opening import Opening
from sluice_service.serving.outputs import OutputBuffer
from sluice_service.serving.run_loop import RunLoop
from sluice_service.settings import Settings
from sluice_service.store import Store


class DurableParts(NamedTuple):
    """What a model has if its sequences outlive this process."""

    pending: Pending
    ownership: Ownership
    checkpointer: Checkpointer


def assemble(
    store: Store,
    table: SequenceTable,
    versions: Versions,
    admission: Admission,
    opening: Opening,
    attachments: Attachments,
    outputs: OutputBuffer,
    landing: Landing,
    runs: RunLoop,
    *,
    metrics: ModelMetrics,
    settings: Settings,
) -> DurableParts:
    """Have `store` hold the sequences of `table`."""
    pending = Pending(table, checkpoint_steps=settings.checkpoint_steps)
    snapshots = Snapshots(table, outputs, versions)
    ownership = Ownership(store, metrics.name, table, admission, opening, snapshots, runs)
    checkpointer = Checkpointer(
        store,
        table,
        attachments,
        outputs,
        runs,
        snapshots,
        ownership,
        pending,
        metrics,
        checkpoint_seconds=settings.checkpoint_seconds,
        lease_seconds=settings.record_seconds,
    )
    attachments.on_departure = pending.add
    landing.on_applied = pending.note_applied
    return DurableParts(pending, ownership, checkpointer)
