"""Communication over MPI. Importing it starts no MPI: `world.start` does, or `MPI.Init` of a caller's own."""

from __future__ import annotations

import sys

import mpi4py

if "mpi4py.MPI" not in sys.modules:  # else MPI runs already, and its finalization is its owner's
    mpi4py.rc.initialize = False
