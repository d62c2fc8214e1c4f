# The server and the offline job on NVIDIA GPUs of compute capability 8.0 or later, from the pins in requirements/cuda.txt.
#   docker build -f deploy/docker/cuda.Dockerfile -t prosparse-serve:0.1.0-cuda .

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
# Ubuntu keeps one version of a package at a time: a pinned one would be gone with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/prosparse/venv
ENV PATH=/opt/prosparse/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements requirements
RUN pip install --no-deps -r requirements/cuda.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY sparse_backend sparse_backend
# No GPU while an image is built: the kernels of every card, and PTX for later ones.
RUN pip install --no-deps --no-build-isolation . \
 && PROSPARSE_CACHE_DIR=/opt/prosparse/kernels prosparse build --device cuda --arch all

# torch brings CUDA's libraries in Python packages: this stage holds the driver's hooks only, no toolkit.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# Triton, and with it torch.compile, needs a C compiler and Python's headers where it runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --create-home prosparse \
 && install --directory --owner prosparse --group prosparse /var/cache/prosparse
COPY --from=build /opt/prosparse /opt/prosparse
COPY deploy/docker/entrypoint /usr/local/bin/entrypoint
# All that is written lies under /var/cache/prosparse: the root may be read-only.
ENV PATH=/opt/prosparse/venv/bin:$PATH \
    PROSPARSE_HOST=0.0.0.0 \
    PROSPARSE_CACHE_DIR=/var/cache/prosparse/kernels \
    XDG_CACHE_HOME=/var/cache/prosparse \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/prosparse/inductor \
    TRITON_CACHE_DIR=/var/cache/prosparse/triton
# By number: an orchestrator that forbids root must see that it is none.
USER 10001:10001
WORKDIR /home/prosparse
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["entrypoint"]
CMD ["serve", "/model"]
