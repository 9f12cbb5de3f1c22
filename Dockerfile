# syntax=docker/dockerfile:1
# The GPU environment, for one of the two lines of Megatron (nemo_aapo/lines.py): trtllm, learner and TensorRT-LLM in one
# image, or newest, the learner alone. No image of it was ever built where this was written.
#
#   docker build --build-arg UID=$(id -u) -t nemo_aapo .
#   docker build --build-arg UID=$(id -u) --build-arg LINE=newest -t nemo_aapo:newest .
#   mkdir -p results
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/results:/opt/nemo_aapo/results" \
#       -v /models:/models -v "$PWD/data:/data" nemo_aapo \
#       scripts/train.py model.path=/models/... data.train=/data/... data.validation=/data/...
#
ARG LINE=trtllm

# The release image is the base because TensorRT-LLM, torch, CUDA, NCCL and TransformerEngine in it are built for each
# other. TensorRT-LLM 1.2.1 takes torch >= 2.9.1, <= 2.10.0a0; megatron-core 0.16 TransformerEngine >= 2.9, < 2.12;
# megatron-bridge 0.3 >= 2.10, < 2.13.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1 AS trtllm

# The image's constraint file would hold back versions that we pin; --no-deps keeps pip from touching anything else.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Before the sources, so that a change of code does not install anew.
COPY requirements/gpu.txt /tmp/gpu.txt
RUN python3 -m pip install --no-deps --no-build-isolation -r /tmp/gpu.txt && rm /tmp/gpu.txt

# Keep the image's TransformerEngine if Megatron takes it; else build one against the image's own torch.
ARG TRANSFORMER_ENGINE=2.11.0
RUN python3 -c "import sys; from importlib.metadata import version; from packaging.specifiers import SpecifierSet; \
sys.exit(not SpecifierSet('>=2.10,<2.12', prereleases=True).contains(version('transformer_engine')))" \
 || NVTE_FRAMEWORK=pytorch python3 -m pip install --no-deps --no-build-isolation \
        transformer_engine==${TRANSFORMER_ENGINE} \
        transformer_engine_cu13==${TRANSFORMER_ENGINE} \
        transformer_engine_torch==${TRANSFORMER_ENGINE}

# NeMo Framework 26.08 is the release that Megatron-Bridge 0.6 belongs to. Its torch, CUDA, NCCL and TransformerEngine stay;
# its Megatron, a checkout, gives way to the release whose sources are known here. TensorRT-LLM pins transformers 4: its
# rollout servers run from an image of the line trtllm (docs/guide/install.md).
FROM nvcr.io/nvidia/nemo:26.08 AS newest

ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

COPY requirements/gpu.txt requirements/newest.txt /tmp/
RUN python3 -m pip install --no-deps --no-build-isolation -r /tmp/gpu.txt \
 && python3 -m pip install --no-deps --no-build-isolation -r /tmp/newest.txt \
 && rm /tmp/gpu.txt /tmp/newest.txt

FROM ${LINE}

WORKDIR /opt/nemo_aapo
COPY . .
RUN python3 -m pip install --no-deps --no-build-isolation -e .

# Rewards and tokenizers handle text that a model wrote, and need no rights for it. Only results/ can be written: by the
# uid that owns the mounted folder on the host, which the base image may have given to a user of its own (--non-unique).
ARG UID=1000
RUN useradd --non-unique --uid ${UID} --create-home --shell /bin/bash aapo && mkdir -p results && chown aapo results
USER aapo
ENV PYTHONUNBUFFERED=1

# A container whose GPU, libraries or file system are not what the tests saw says so in `docker ps`.
HEALTHCHECK --interval=5m --timeout=120s --start-period=60s \
    CMD ["python3", "/opt/nemo_aapo/scripts/doctor.py", "--quick"]

# The base image's own entry point stays in front: it checks the driver and sets up CUDA's compatibility libraries.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "python3"]
CMD ["scripts/train.py", "--help"]
