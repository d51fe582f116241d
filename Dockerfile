# All five commands for a machine with an NVIDIA GPU. Needs the NVIDIA Container Toolkit and a driver for CUDA 13:
# PyTorch's wheels bring the other CUDA libraries. The versions are those of requirements/lock.txt.
#
#   docker build --tag mgll-mllm .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume "$HOME/.cache:/cache" mgll-mllm \
#     swap-encoder --mllm llava-med --encoder mgll-fundus.pt
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume "$HOME/.cache:/cache" --shm-size 8g mgll-mllm \
#     retrain-projector --model llava-med-mgll-fundus --data train.json --images images/
#
# The full Debian image, because Triton compiles at run time and needs gcc. DeepSpeed's offloading to the CPU
# (scripts/deepspeed/zero3_offload.json) also needs nvcc, which this image does not have.
FROM python:3.11-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/mgll-mllm
COPY requirements/lock.txt requirements/lock.txt
RUN pip install --constraint requirements/lock.txt pip setuptools \
    && pip install --build-constraint requirements/lock.txt --requirement requirements/lock.txt

COPY . .
RUN pip install --no-deps --no-build-isolation . && swap-encoder --version

# Any user may run it (--user above); models, features and compiled kernels are kept under /cache.
ENV HOME=/cache USER=mgll HF_HOME=/cache/huggingface MGLL_CACHE_DIR=/cache/mgll-mllm
RUN mkdir --mode 1777 /cache
USER 65534:65534
WORKDIR /work
CMD ["swap-encoder", "--help"]
