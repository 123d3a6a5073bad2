#!/usr/bin/env bash
# Runs a program in the container with the folders and rights that it needs:
#   docker/run.sh [DOCKER-OPTION... --] PROGRAM ARGUMENT...
#   docker/run.sh train.py --outdir=/runs --data=/data/mine.zip --gpus=2
#   docker/run.sh --network=host -- -m torch.distributed.run --nnodes=2 ... train.py ...
# Settings (environment variables):
#   DATA, RUNS   host folders, mounted as /data (read-only) and /runs  [./data, ./runs]
#   CACHE        host folder, mounted as /cache: compiled kernels, downloads, dataset statistics  [~/.cache/dnnlib]
#   GPUS         as docker run --gpus: all, 2, device=0; none: no GPU  [all]
#   SHM          shared memory, through which data loader workers pass images  [8g]
#   STOP_SEC     grace period of docker stop, in which a run saves itself  [120]
#   IMAGE        container image  [stylegan2-ada-clean]
set -euo pipefail

if [ "$#" -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit 0
fi

data=${DATA:-$PWD/data} runs=${RUNS:-$PWD/runs} cache=${CACHE:-$HOME/.cache/dnnlib} gpus=${GPUS:-all}
if [ ! -d "$data" ]; then
    echo "Error: DATA=$data is not a folder; set DATA to the folder of the dataset" >&2
    exit 2
fi
# Docker would create them owned by root.
mkdir -p "$runs" "$cache"

# Files belong to the user who starts the run. NCCL and RDMA need unlimited locked memory.
options=(--rm --user "$(id -u):$(id -g)" --shm-size "${SHM:-8g}" --ulimit memlock=-1
    --stop-timeout "${STOP_SEC:-120}"
    --volume "$(realpath "$data"):/data:ro" --volume "$(realpath "$runs"):/runs"
    --volume "$(realpath "$cache"):/cache")
if [ "$gpus" != none ]; then
    options+=(--gpus "$gpus")
fi
if [ -t 0 ] && [ -t 1 ]; then
    options+=(--interactive --tty)
fi

for argument in "$@"; do
    if [ "$argument" = -- ]; then
        while [ "$1" != -- ]; do
            options+=("$1")
            shift
        done
        shift
        break
    fi
done
exec docker run "${options[@]}" "${IMAGE:-stylegan2-ada-clean}" "$@"
