"""A partition laid over the ranks of a communicator: MPI's Cartesian topology, and its subcommunicators."""

from __future__ import annotations

from mpi4py import MPI

from hpctrain.errors import PlanError
from hpctrain.partition import AXES, Partition


class ProcessGrid:
    """The process grid of one partition. Ranks from `partition.size` on are idle and get no communicator.

    Building one is collective over `comm`. Raises PlanError, on all ranks alike, when there are too few ranks.
    """

    def __init__(self, comm: MPI.Intracomm, partition: Partition) -> None:
        if partition.size > comm.size:
            raise PlanError(
                f"grid {partition} needs {partition.size} ranks, but there are {comm.size}: "
                f"start {partition.size} ranks or give a smaller grid"
            )
        self.partition = partition
        # reorder=False: all grids over the same ranks must agree on who is rank r
        self.comm = comm.Create_cart(partition.shape, reorder=False)
        self.active = self.comm != MPI.COMM_NULL

        self._subs: dict[tuple[str, ...], MPI.Intracomm] = {}

    def sub(self, axes: tuple[str, ...]) -> MPI.Intracomm | None:
        """The ranks that differ from this one only along `axes`; None on idle ranks. Collective at first."""
        if not self.active:
            return None
        if axes not in self._subs:
            self._subs[axes] = self.comm.Sub([axis in axes for axis in AXES])
        return self._subs[axes]

    def free(self) -> None:
        """Release the communicators. Collective."""
        for comm in (*self._subs.values(), *([self.comm] if self.active else [])):
            comm.Free()


class Grids:
    """The process grids over the ranks of `comm`, each made when first asked for, collectively."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._found: dict[Partition, ProcessGrid] = {}

    def grid(self, partition: Partition) -> ProcessGrid:
        """Of a partition. Collective at first."""
        if partition not in self._found:
            self._found[partition] = ProcessGrid(self._comm, partition)
        return self._found[partition]

    def sub(self, group: tuple[Partition, tuple[str, ...]]) -> MPI.Intracomm | None:
        """The ranks that hold what this one holds along all other axes; None if that is nothing. Collective."""
        partition, axes = group
        return self.grid(partition).sub(axes)

    def free(self) -> None:
        """Release the communicators. Collective."""
        for grid in self._found.values():
            grid.free()
        self._found.clear()
