#!/bin/bash
# Train on Slurm, over as many jobs as it takes: `sbatch jobs/slurm.sh [CONFIG.toml]` starts, and it resumes.

# Yours to edit. Slurm reads its lines up to the first command.
#SBATCH --account=ACCOUNT
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00

# On USR1 the ranks save, and leave with 75. The seconds must cover a step and a checkpoint; Slurm may be up to a minute
# early. No `B:` before the signal: it is for the ranks, not for this shell.
#SBATCH --signal=USR1@600
# A node that fails starts the job again; all starts write to one log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hpctrain-%j.log

config=${1:-train.toml}
max_restarts=100 # in all
max_failures=3   # in a row, for anything but a stop on purpose

# To use a site's MPI and not the one in the Python environment, mpi4py must load the library that srun speaks to:
# module load openmpi
# export MPI4PY_LIBMPI=/where/that/module/is/lib/libmpi.so

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch by itself
export PMIX_MCA_psec=native                      # or PMIx may warn that it lacks munge
# --mpi: pmix for Open MPI, pmi2 for MPICH. -K0: with -K1 the first rank to leave with 75 would have the others killed.
# Ranks that wait for one that died are ended by PMIx at once, or after --wait.
srun --mpi=pmix -K0 --wait=60 --cpus-per-task="$OMP_NUM_THREADS" hpctrain train "$config" --resume
status=$?

# 0: finished. 2: bad input, which would be as bad the next time. 75: stopped on purpose.
case $status in 0 | 2) exit $status ;; esac
history=hpctrain-$SLURM_JOB_ID.restarts
echo "$(date) $SLURM_JOB_NODELIST status $status" >>"$history"
failures=$(tail -n $((max_failures + 1)) "$history" | grep -cv 'status 75$')
if [ "$(wc -l <"$history")" -gt $max_restarts ] || [ "$failures" -gt $max_failures ]; then
  echo "slurm.sh: status $status, and no restart: see $history; to go on all the same, sbatch again" >&2
  exit $status
fi
echo "slurm.sh: status $status, starting again"
scontrol requeue "$SLURM_JOB_ID"
