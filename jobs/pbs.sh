#!/bin/bash
# Train on PBS, over as many jobs as it takes: `qsub jobs/pbs.sh` starts, and it resumes.

# Yours to edit: here 2 nodes, on each 4 ranks of 8 threads. PBS reads its lines up to the first command.
#PBS -A ACCOUNT
#PBS -l select=2:ncpus=32:mpiprocs=4:ompthreads=8
#PBS -l walltime=04:00:00
#PBS -j oe

script=jobs/pbs.sh # this file, from the folder of qsub
config=train.toml
stop_after=230m  # the walltime less a step, a checkpoint and the start of MPI
max_restarts=100 # in all
max_failures=3   # in a row, for anything but a stop on purpose

# To use a site's MPI and not the one in the Python environment, mpi4py must load the library of that mpirun:
# module load openmpi
# export MPI4PY_LIBMPI=/where/that/module/is/lib/libmpi.so # and below: -x MPI4PY_LIBMPI

trap 'exit 143' TERM INT # qdel: this job must not come back
cd "$PBS_O_WORKDIR" || exit 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
log=hpctrain-$PBS_JOBID.log # at hand while the job runs, unlike its output
# PBS cannot warn before the walltime, so `timeout` sends USR1, on which the ranks save and leave with 75. --foreground:
# only to mpirun, which passes it on; any other signal makes mpirun kill the ranks.
timeout --foreground --preserve-status --signal=USR1 "$stop_after" \
  mpirun --hostfile "$PBS_NODEFILE" --map-by "slot:PE=$OMP_NUM_THREADS" -x PATH -x OMP_NUM_THREADS \
  hpctrain train "$config" --resume --json >>"$log"
status=$?
# Open MPI 5's mpirun returns 0 also when it loses a node. Only a run that is finished closes with the line of --json.
if [ $status = 0 ] && ! grep -q '^{"command": "train"' "$log"; then status=3; fi

# 0: finished. 2: bad input, which would be as bad the next time. 75: stopped on purpose.
case $status in 0 | 2) exit $status ;; esac
history=${HPCTRAIN_RESTARTS:-hpctrain-$PBS_JOBID.restarts} # named by the first job of the chain
echo "$(date) $PBS_JOBID $(hostname) status $status" >>"$history"
failures=$(tail -n $((max_failures + 1)) "$history" | grep -cv 'status 75$')
if [ "$(wc -l <"$history")" -gt $max_restarts ] || [ "$failures" -gt $max_failures ]; then
  echo "pbs.sh: status $status, and no restart: see $history; to go on all the same, qsub again" >&2
  exit $status
fi
echo "pbs.sh: status $status, starting again"
qsub -v HPCTRAIN_RESTARTS="$history" "$script"
