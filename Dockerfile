# An image for training on CPUs and NVIDIA GPUs: docker build -t rl . && docker run --gpus all rl spmdrl doctor
# torch's wheels bring CUDA; the driver's libraries come from the container runtime.
FROM debian:12-slim
COPY setup.cfg pyproject.toml README.md LICENSE requirements.txt /src/
COPY src /src/src
COPY scripts/install.sh /src/scripts/install.sh
RUN /src/scripts/install.sh --system /opt/spmdrl && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/spmdrl/bin:$PATH
CMD ["spmdrl", "--help"]
