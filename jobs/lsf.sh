#!/bin/bash
# Train on LSF, over as many jobs as it takes: `bsub < jobs/lsf.sh` starts, and it resumes.

# Yours to edit: here 8 ranks, on each node 4 of 8 threads.
#BSUB -P ACCOUNT
#BSUB -n 8
#BSUB -R "span[ptile=4] affinity[core(8)]"
#BSUB -W 4:00
# LSF starts the job again when this script exits with 75 (-Q) and when a host fails (-r); -o appends.
#BSUB -Q 75
#BSUB -r
#BSUB -o hpctrain-%J.out

export OMP_NUM_THREADS=8
config=train.toml
stop_after=230m  # the run limit less a step, a checkpoint and the start of MPI
max_restarts=100 # in all
max_failures=3   # in a row, for anything but a stop on purpose

# To use a site's MPI and not the one in the Python environment, mpi4py must load the library of that mpirun:
# module load openmpi
# export MPI4PY_LIBMPI=/where/that/module/is/lib/libmpi.so # and below: -x MPI4PY_LIBMPI

log=hpctrain-$LSB_JOBID.log
trap 'exit 143' TERM INT # bkill: this job must not come back
# `timeout` sends USR1, on which the ranks save and leave with 75. --foreground: only to mpirun, which passes it on.
# LSF's own warning, -wa, is for every process of the job, and mpirun's daemons on other nodes die of it.
timeout --foreground --preserve-status --signal=USR1 "$stop_after" \
  mpirun --hostfile "$LSB_DJOB_HOSTFILE" --map-by "slot:PE=$OMP_NUM_THREADS" -x PATH -x OMP_NUM_THREADS \
  hpctrain train "$config" --resume --json >>"$log"
status=$?
# Open MPI 5's mpirun returns 0 also when it loses a node. Only a run that is finished closes with the line of --json.
if [ $status = 0 ] && ! grep -q '^{"command": "train"' "$log"; then status=3; fi

# 0: finished. 2: bad input, which would be as bad the next time. 75: stopped on purpose.
case $status in 0 | 2) exit $status ;; esac
history=hpctrain-$LSB_JOBID.restarts
echo "$(date) $(hostname) status $status" >>"$history"
failures=$(tail -n $((max_failures + 1)) "$history" | grep -cv 'status 75$')
if [ "$(wc -l <"$history")" -gt $max_restarts ] || [ "$failures" -gt $max_failures ]; then
  echo "lsf.sh: status $status, and no restart: see $history; to go on all the same, bsub again" >&2
  exit 1
fi
echo "lsf.sh: status $status, starting again"
exit 75
