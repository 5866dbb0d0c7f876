#!/bin/bash
# Train on Flux, over as many jobs as it takes: `flux batch jobs/flux.sh [CONFIG.toml]` starts, and it resumes.

# Yours to edit, here and `ranks`, `threads` below. Flux wants its lines together.
# flux: --bank=ACCOUNT
# flux: --nodes=2 --nslots=8 --cores-per-slot=8
# flux: --time-limit=4h
# flux: --signal=USR1@10m # on this the ranks save, and leave with 75; it must cover a step and a checkpoint
# flux: --output=hpctrain-{{id}}.log

ranks=8
threads=8
script=jobs/flux.sh # this file, from the folder of `flux batch`
config=${1:-train.toml}
max_restarts=100 # in all
max_failures=3   # in a row, for anything but a stop on purpose

# To use a site's MPI and not the one in the Python environment, mpi4py must load the library that Flux speaks to:
# module load openmpi
# export MPI4PY_LIBMPI=/where/that/module/is/lib/libmpi.so

trap : USR1 # newer Flux sends the signal to this shell too
export OMP_NUM_THREADS=$threads
# pmi=pmix, of flux-pmix, is for Open MPI; MPICH needs no -o.
flux run -o pmi=pmix --ntasks=$ranks --cores-per-task=$threads hpctrain train "$config" --resume
status=$?

# 0: finished. 2: bad input, which would be as bad the next time. 75: stopped on purpose.
case $status in 0 | 2) exit $status ;; esac
export HPCTRAIN_RESTARTS=${HPCTRAIN_RESTARTS:-hpctrain-$(date +%Y%m%d-%H%M%S).restarts} # the whole chain's
echo "$(date) $(hostname) status $status" >>"$HPCTRAIN_RESTARTS"
failures=$(tail -n $((max_failures + 1)) "$HPCTRAIN_RESTARTS" | grep -cv 'status 75$')
if [ "$(wc -l <"$HPCTRAIN_RESTARTS")" -gt $max_restarts ] || [ "$failures" -gt $max_failures ]; then
  echo "flux.sh: status $status, and no restart: see $HPCTRAIN_RESTARTS; to go on all the same, flux batch again" >&2
  exit $status
fi
echo "flux.sh: status $status, starting again"
flux --parent batch "$script" "$config" # the instance around this job's own
