#!/bin/bash
# Train on this machine, and again after a crash: `jobs/local.sh [CONFIG.toml]` starts, and it resumes.

# Yours to edit.
ranks=4
threads=2
config=${1:-train.toml}
max_failures=3 # restarts in all
pause=10       # seconds before a restart

# To use a site's MPI and not the one in the Python environment, mpi4py must load the library of that mpirun:
# module load openmpi
# export MPI4PY_LIBMPI=/where/that/module/is/lib/libmpi.so

# Ctrl-C, kill or the end of the session: the ranks save and leave with 75 (USR1); asked again, they end at once (TERM).
# -m: mpirun gets a process group of its own, or Ctrl-C would reach it, and it would kill the ranks.
set -m
asked=0 request=USR1
trap 'kill "-$request" "$job" 2>/dev/null; request=TERM; ((++asked))' INT TERM HUP USR1

export OMP_NUM_THREADS=$threads
for ((failures = 0; !asked; failures++)); do
  mpirun -n "$ranks" --bind-to none hpctrain train "$config" --resume </dev/null &
  job=$!
  # A signal ends `wait` early: only when none came meanwhile is this mpirun's status.
  while
    before=$asked
    wait "$job"
    status=$?
    ((asked > before))
  do :; done
  case $status in 0 | 2 | 75) break ;; esac # finished; bad input; stopped on purpose
  echo "local.sh: $(date) status $status, restarts so far: $failures" >&2
  if ((asked || failures == max_failures)); then break; fi
  sleep "$pause" &
  wait $!
done
exit "$status"
