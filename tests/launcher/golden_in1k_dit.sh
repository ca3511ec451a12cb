#!/bin/bash

# Parameters
#SBATCH --comment={runs}/in1k_dit/RUN-ID
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --job-name=sg-RUN-ID-train
#SBATCH --no-requeue
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output={runs}/in1k_dit/RUN-ID/attempts/0001/job/%j_0_log.out
#SBATCH --signal=USR2@91
#SBATCH --time=1440

# setup
export PYTHONPATH={runs}/in1k_dit/RUN-ID/attempts/0001/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=8
cd {runs}/in1k_dit/RUN-ID/attempts/0001/code

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {runs}/in1k_dit/RUN-ID/attempts/0001/job/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 --cpus-per-task=8 {python} -u -m submitit.core._submit {runs}/in1k_dit/RUN-ID/attempts/0001/job
