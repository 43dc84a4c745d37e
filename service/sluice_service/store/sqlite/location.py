"""Checks that the place of a SQLite file keeps data safe."""

import os
import stat
from pathlib import Path

from sluice_service.store.protocol import StoreSetupError

# Locks and the shared memory of the log are unreliable there.
_NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "afs",
        "beegfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.rclone",
        "fuse.gcsfuse",
        "fuse.ceph",
    ]
)
_MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))


def judge_place(path: Path) -> list[str]:
    """Warnings about the place of a store's file. Raises StoreSetupError if it cannot be there."""
    folder = path.parent
    if not folder.is_dir():
        raise StoreSetupError(
            f"there is no folder {folder} for the SQLite store; make it, or mend the path"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreSetupError(
            f"the SQLite store needs to write beside its file: give this user the folder {folder}"
        )
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise StoreSetupError(f"{path} is not a file; name one for the SQLite store")
    mounts = Path("/proc/self/mounts")
    table = mounts.read_text(errors="replace") if mounts.exists() else ""
    return judge_file_system(path, find_file_system(folder.resolve(), table))


def judge_file_system(path: Path, kind: str) -> list[str]:
    """Warnings about a file system. Raises StoreSetupError for one that may lose data."""
    if kind in _NETWORK_FILE_SYSTEMS:
        raise StoreSetupError(
            f"the SQLite store {path} is on a network file system ({kind}), where SQLite keeps no "
            "promise; put it on a local disk, or use a redis:// store"
        )
    if kind in _MEMORY_FILE_SYSTEMS:
        return [
            f"the SQLite store {path} is in memory ({kind}): it outlives the server, "
            "but not the machine"
        ]
    return []


def find_file_system(folder: Path, mounts: str) -> str:
    """The kind of file system that a folder is on, by the table of mounts; empty if unknown."""
    best, kind = 0, ""
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        # Of several mounts on one point the last one counts.
        mounted = Path(point.replace("\\040", " ")).parts
        if len(mounted) >= best and folder.parts[: len(mounted)] == mounted:
            best, kind = len(mounted), found
    return kind
