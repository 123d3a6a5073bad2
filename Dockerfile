# The training container: CUDA base image, locked packages, all kernels compiled; no compiler, no root.
#   docker build --tag stylegan2-ada-clean .
#   docker/run.sh train.py --outdir=/runs --data=/data/mine.zip --gpus=1
#
# The base is the smallest CUDA image: it has the forward compatibility package for older data center drivers. The
# CUDA libraries come with PyTorch's wheels. Any Ubuntu or Debian works: --build-arg BASE=ubuntu:24.04.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS packages
ARG PYTHON=3.12
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "python${PYTHON}-venv=${PYTHON}.*" "tini=0.19.*" \
    && rm -rf /var/lib/apt/lists/*
RUN "python${PYTHON}" -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
# Extras of pyproject.toml, and a PyTorch version other than the locked one. For CUDA 12, for example:
#   --build-arg TORCH=2.13.0+cu126 --build-arg EXTRAS=cuda12,lmdb,pyspng --build-arg PIP_EXTRA_INDEX_URL=...
ARG EXTRAS=cuda,export,lmdb,pyspng
ARG TORCH=
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/packages
COPY pyproject.toml requirements.lock docker/requirements.py ./
RUN python requirements.py --extras="${EXTRAS}" --torch="${TORCH}" --out=. \
    && python -m pip install --no-cache-dir --requirement wanted.txt --constraint pinned.txt

# NVRTC, which comes with PyTorch, needs no GPU. A separate stage, so that only changes of the operators recompile.
FROM packages AS kernels
ARG ARCHS=sm_75,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120
WORKDIR /build
COPY dnnlib dnnlib
COPY torch_utils torch_utils
RUN python -m torch_utils.ops.build --arch="${ARCHS}" --compiler=nvrtc --cache=/opt/cache/ops

FROM packages AS training
# Any user of `docker run --user` needs a user name for caches and a writable home.
RUN useradd --uid 10001 --user-group --create-home trainer \
    && install --directory --mode=1777 /home/trainer /data /runs /cache
COPY --from=kernels /opt/cache /opt/cache
WORKDIR /app
COPY . .
ENV HOME=/home/trainer USER=trainer DNNLIB_CACHE_DIR=/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME ["/data", "/runs", "/cache"]
# A run aborts by itself when a process hangs (--timeout), and its exit status says why: nothing to poll.
HEALTHCHECK NONE
# PID 1 must forward signals and reap zombies, which tini does.
ENTRYPOINT ["tini", "--", "/app/docker/entrypoint.sh"]
CMD ["-m", "torch_utils.doctor"]
