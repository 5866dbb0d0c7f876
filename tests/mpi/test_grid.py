"""Process grids against MPI's own coordinates and subcommunicators."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from mpi4py import MPI
from networks import partitions

from hpctrain.comm.grid import ProcessGrid
from hpctrain.partition import AXES


@pytest.mark.parallel([1, 2, 3, 4])
def test_coordinates_and_subgrids_are_those_of_mpi(comm: Any) -> None:
    tried = 0
    for partition in partitions(dict.fromkeys(AXES, 4), range(1, comm.size + 1), most_axes=3):
        grid = ProcessGrid(comm, partition)
        assert grid.active == (comm.rank < partition.size)
        if not grid.active:
            assert grid.comm == MPI.COMM_NULL
            assert grid.sub(("batch",)) is None
            continue
        assert grid.comm.rank == comm.rank
        assert tuple(grid.comm.Get_coords(comm.rank)) == partition.coords(comm.rank)
        for axes in [(), *((axis,) for axis in AXES), *pairwise(AXES), AXES]:
            sub = grid.sub(axes)
            assert sub is not None
            others = [i for i, axis in enumerate(AXES) if axis not in axes]
            mine = partition.coords(comm.rank)
            line = [r for r in range(partition.size) if all(partition.coords(r)[i] == mine[i] for i in others)]
            assert sub.allgather(comm.rank) == line
            assert sub.rank == partition.index(axes, comm.rank)
        tried += 1
    assert tried >= 1
