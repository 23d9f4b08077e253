# Everything that runs without a GPU: environments, SGLang, Ray and Megatron-core, in the versions of requirements/cpu.lock.
#
#   docker build -f configs/clusters/cpu.Dockerfile -t polyturn:cpu .
#   docker run --rm polyturn:cpu polyturn train quickstart --dry-run
#
# `--target environments` stops before torch, SGLang and Megatron: environments, and evaluation of an endpoint.
ARG BASE=debian:12-slim
FROM ${BASE} AS system
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bubblewrap ca-certificates git iproute2 procps python3.11 python3.11-venv tini \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/polyturn
ENV PATH=/opt/polyturn/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["tini", "-g", "--"]
CMD ["polyturn", "--help"]

FROM system AS environments
COPY . /opt/source
RUN pip install --no-cache-dir "setuptools>=77" \
    && pip install --no-cache-dir --no-build-isolation --editable /opt/source

FROM system AS packages
# Before the sources, so that a change to these does not install everything again. The lock is complete, so --no-deps
# installs exactly it: no CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/cpu.lock /opt/requirements/cpu.lock
RUN pip install --no-cache-dir --no-deps --extra-index-url "${TORCH_INDEX}" -r /opt/requirements/cpu.lock

FROM packages AS polyturn
COPY . /opt/source
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable /opt/source
