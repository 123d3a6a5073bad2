#!/usr/bin/env bash
# Runs a program of the image with the folders and rights that it needs:
#   docker/run.sh [DOCKER-OPTION... --] PROGRAM ARGUMENT...
#   docker/run.sh train.py --outdir=/runs --data=/data/mine.zip --gpus=2
#   docker/run.sh --network=host -- -m torch.distributed.run --nnodes=2 ... train.py ...
# Settings, from the environment:
#   DATA, RUNS   folders of this machine, seen inside as /data (not to be written) and /runs  [./data, ./runs]
#   CACHE        likewise /cache: compiled kernels, downloads, statistics of datasets  [~/.cache/dnnlib]
#   GPUS         as for docker run --gpus: all, 2, device=0; none: without GPU  [all]
#   SHM          shared memory, through which readers hand pictures over  [8g]
#   STOP_SEC     seconds from docker stop's signal to the end, in which a run saves itself  [120]
#   IMAGE        [stylegan2-ada-clean]
set -euo pipefail

if [ "$#" -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit 0
fi

data=${DATA:-$PWD/data} runs=${RUNS:-$PWD/runs} cache=${CACHE:-$HOME/.cache/dnnlib} gpus=${GPUS:-all}
if [ ! -d "$data" ]; then
    echo "Error: DATA=$data is no folder; set DATA to the one that holds the dataset" >&2
    exit 2
fi
# Docker would make them too, but for root alone.
mkdir -p "$runs" "$cache"

# Files belong to who starts the run. The pages that GPUs and network cards share must stay in memory.
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
