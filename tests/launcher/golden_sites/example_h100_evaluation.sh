#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --comment=/project/runs/in1k_dit/RUN
#SBATCH --cpus-per-task=12
#SBATCH --exclude='node[017,023]'
#SBATCH --gres=gpu:h100:1
#SBATCH --job-name=sg-RUN-eval
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/in1k_dit/RUN/evals/%j_0_log.out
#SBATCH --partition=h100
#SBATCH --reservation=spring
#SBATCH --signal=USR2@90
#SBATCH --switches=1@12:00:00
#SBATCH --time=60

# setup
export PATH=/usr/local/bin:/usr/bin:/bin
unset LD_LIBRARY_PATH
export NCCL_NVLS_ENABLE=1
export NCCL_IB_TIMEOUT=22
export PYTHONPATH=/project/runs/in1k_dit/RUN/attempts/0001/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=12
cd /project/runs/in1k_dit/RUN/attempts/0001/code

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /project/runs/in1k_dit/RUN/evals/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 --cpus-per-task=12 --container-image=/images/selfguide.sqsh --container-mounts=/project,/usr/bin/sbatch,/usr/bin/scancel,/usr/bin/scontrol,/usr/bin/squeue,/usr/lib64/slurm,/etc/slurm,/run/munge --no-container-mount-home python3 -u -m submitit.core._submit /project/runs/in1k_dit/RUN/evals

