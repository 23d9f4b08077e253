# The trainer and the engines on NVIDIA GPUs, on top of SGLang's own image, which has CUDA, torch, flashinfer and NCCL as
# SGLang is built for them. The versions are those of the extra `train` in pyproject.toml.
#
#   docker build -f configs/clusters/gpu.Dockerfile -t polyturn:gpu .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 polyturn:gpu polyturn train RECIPE
#
# `--build-arg TRANSFORMER_ENGINE=` leaves Transformer Engine out; the trainer then uses torch's layers.
ARG BASE=lmsysorg/sglang:v0.5.23
FROM ${BASE} AS system
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap iproute2 procps tini \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /work
ENTRYPOINT ["tini", "-g", "--"]
CMD ["polyturn", "--help"]

FROM system AS packages
# --no-deps: torch, numpy and transformers stay what SGLang's image has.
RUN pip install --no-cache-dir --no-deps megatron-core==0.16.1 sglang-router==0.3.2 \
    && pip install --no-cache-dir ray==2.60.0 "tensorboardX>=2.6"
ARG TRANSFORMER_ENGINE=transformer-engine[pytorch]
RUN if [ -n "${TRANSFORMER_ENGINE}" ]; then pip install --no-cache-dir --no-build-isolation "${TRANSFORMER_ENGINE}"; fi

FROM packages AS polyturn
COPY . /opt/source
RUN pip install --no-cache-dir "setuptools>=77" \
    && pip install --no-cache-dir --no-build-isolation --editable /opt/source
