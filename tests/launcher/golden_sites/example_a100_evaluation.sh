#!/bin/bash

# Parameters
#SBATCH --account=proj-0815
#SBATCH --comment=/project/runs/in1k_dit/RUN
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=a100:1
#SBATCH --job-name=sg-RUN-eval
#SBATCH --licenses=work:1
#SBATCH --mail-type=FAIL
#SBATCH --mem=122880MB
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/in1k_dit/RUN/evals/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --signal=USR2@90
#SBATCH --time=240

# setup
type module >/dev/null 2>&1 || . /etc/profile
module load gcc/12.3 cuda/12.6 || exit 1
export TMPDIR="/local/$SLURM_JOB_ID"
export NCCL_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export PYTHONPATH=/project/runs/in1k_dit/RUN/attempts/0001/code${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=16
cd /project/runs/in1k_dit/RUN/attempts/0001/code

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /project/runs/in1k_dit/RUN/evals/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 --cpus-per-task=16 {python} -u -m submitit.core._submit /project/runs/in1k_dit/RUN/evals

