"""Keeps sequences beyond the life of their server: one protocol, and the stores that follow it."""

from sluice_service.store.checkpoint import Checkpoint, pack, unpack
from sluice_service.store.protocol import (
    ClaimRequest,
    Closing,
    Granted,
    Key,
    Packed,
    Store,
    Stored,
    StoreError,
    StoreSetupError,
    Verdict,
    Write,
)
from sluice_service.store.redaction import redact
from sluice_service.store.urls import open_store

__all__ = [
    "Checkpoint",
    "ClaimRequest",
    "Closing",
    "Granted",
    "Key",
    "Packed",
    "Store",
    "StoreError",
    "StoreSetupError",
    "Stored",
    "Verdict",
    "Write",
    "open_store",
    "pack",
    "redact",
    "unpack",
]
