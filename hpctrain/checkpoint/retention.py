"""Which checkpoints stay."""

from __future__ import annotations

import os
from pathlib import Path

from hpctrain.checkpoint.agree import Alone, Communicator, on_first
from hpctrain.checkpoint.format import step_folders
from hpctrain.checkpoint.reader import open_verified
from hpctrain.checkpoint.storage import remove
from hpctrain.durable import sync_folder
from hpctrain.errors import CheckpointError

FEWEST = 2  # one may be damaged


def retain(folder: Path, keep: int, comm: Communicator | None = None) -> None:
    """Delete checkpoints older than the newest `keep` (at least 2) that verify completely.

    Damaged ones do not count, so that what stays can be resumed from. Collective over `comm` where given: the
    ranks share the reading. CheckpointError, on all ranks alike, where a folder cannot be deleted.
    """
    comm = Alone() if comm is None else comm
    paths = on_first(comm, lambda: step_folders(Path(folder)))
    keep = max(keep, FEWEST)
    if len(paths) <= keep:
        return
    for i, path in enumerate(paths):
        keep -= _verifies(path, comm)
        if keep == 0:
            older = paths[i + 1 :]
            break
    else:
        return
    on_first(comm, lambda: _discard(older))


def _verifies(path: Path, comm: Communicator) -> bool:
    try:
        open_verified(path, comm)
    except CheckpointError:
        return False
    return True


def _discard(paths: list[Path]) -> None:
    for path in paths:
        # Under its own name a folder is complete; what is being deleted has another, which the next save removes.
        tmp = path.with_name(f"{path.name[:17]}.tmp")
        remove(tmp)
        os.rename(path, tmp)
        sync_folder(path.parent)
        remove(tmp)
