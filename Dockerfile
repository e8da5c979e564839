# Two images from one file, with the steps that CI runs:
#
#   docker build -t lightseq .                                         NVIDIA's PyTorch image: CUDA, Transformer Engine, apex
#   docker build -t lightseq-cpu --build-arg BASE=python:3.11-slim .   plain Python, CPU only
#
# NVIDIA's image keeps its torch, Transformer Engine and apex: scripts/dependencies.py pins the versions that it finds.
# On the plain image pip installs the torch build that it finds first. To avoid the CUDA libraries, pass
# --build-arg PIP_EXTRA_INDEX_URL=... (the address of an index with CPU builds).
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
# hadolint ignore=DL3006
FROM ${BASE}

ARG PIP_EXTRA_INDEX_URL
# Run the tests while building (0: don't).
ARG RUN_TESTS=1
# The image is the environment: no virtual environment inside it.
ENV LIGHTSEQ_VENV=none PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1

# Besides Python, only a compiler is needed; NVIDIA's image has one.
# hadolint ignore=DL3008
RUN command -v g++ >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*; }

WORKDIR /opt/lightseq
COPY . .
RUN bash scripts/setup_env.sh --dev && { [ "$RUN_TESTS" = 0 ] || bash scripts/run_tests.sh; }

# After the tests: the environment is ready and need not be checked at every start.
ENV LIGHTSEQ_SETUP=0
CMD ["bash", "scripts/pretrain_gpt.sh"]
