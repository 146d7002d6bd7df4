# The image of every node: Ray, torch and this package, versions as in the constraints file.
#
#   GPU   docker build -t nli:gpu .
#   CPU   docker build -t nli:cpu --build-arg BASE=rayproject/ray:2.60.0-py312-cpu --build-arg VARIANT=cpu .
#
#   docker run --rm --gpus all --shm-size=8g --env-file .env -e NLI_STORAGE_ROOT=/mnt/nli -v "$PWD/out:/mnt/nli" -v hf:/home/ray/huggingface nli:gpu \
#       python -m ray_jobs.train_sft --config configs/train/ablation2.py
#
# Ray and Python must be of one version on head, workers and whoever submits. Keys come at run time, never with the image.

ARG BASE=rayproject/ray:2.60.0-py312-cu130
FROM ${BASE}

# gpu or cpu: decides torch's build, the constraints and whether vLLM is installed
ARG VARIANT=gpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base's own user, uid 1000.
USER ray
WORKDIR /home/ray/nli

# The dependencies first, around empty packages, so that a change of code does not install them again.
COPY --chown=ray:users pyproject.toml README.md constraints.txt constraints-gpu.txt ./
RUN case "$VARIANT" in \
        gpu) constraints=constraints-gpu.txt index=cu130 extras="[gpu]" ;; \
        cpu) constraints=constraints.txt index=cpu extras="" ;; \
        *) echo "VARIANT is gpu or cpu, not $VARIANT" >&2; exit 2 ;; \
    esac \
    && mkdir -p nli/{api,data,engines/transformers,engines/vllm,evaluation,inference,models,runtime,sample,task,teacher,training} ray_jobs \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$index" "$(grep '^torch==' "$constraints")" \
    && pip install --no-cache-dir -c "$constraints" -e ".$extras"

COPY --chown=ray:users nli nli
COPY --chown=ray:users ray_jobs ray_jobs
COPY --chown=ray:users configs configs
COPY --chown=ray:users data/sample data/sample

# Weights are downloaded once, into a volume. Where outputs go is the run's to say (NLI_STORAGE_ROOT): a folder of the image would vanish with the container.
RUN mkdir -p /home/ray/huggingface
ENV HF_HOME=/home/ray/huggingface \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    VLLM_USE_FLASHINFER_SAMPLER=0
VOLUME ["/home/ray/huggingface"]

# A node of a cluster is healthy while its head answers; a container that runs one command is, while the package can be imported.
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s --retries=3 \
    CMD if [ -e /tmp/ray/ray_current_cluster ]; then ray health-check; else python -c "import nli.runtime.config"; fi
