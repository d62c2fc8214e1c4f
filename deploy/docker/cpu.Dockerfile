# The server and the offline job on a CPU, from the pins in requirements/.
#   docker build -f deploy/docker/cpu.Dockerfile -t prosparse-serve:0.1.0-cpu .

FROM python:3.11.13-slim-bookworm AS build
# Debian keeps one version of a package at a time: a pinned one would be gone with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/prosparse/venv
ENV PATH=/opt/prosparse/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements requirements
RUN requirements/install-torch-cpu python \
 && pip install --no-deps -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY sparse_backend sparse_backend
# The kernels of every instruction set; which one is used is decided where the container runs.
RUN pip install --no-deps --no-build-isolation . \
 && PROSPARSE_CACHE_DIR=/opt/prosparse/kernels prosparse build

FROM python:3.11.13-slim-bookworm
# torch.compile needs a C++ compiler where it runs. (This Python brings its own headers.)
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
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
    TORCHINDUCTOR_CACHE_DIR=/var/cache/prosparse/inductor
# By number: an orchestrator that forbids root must see that it is none.
USER 10001:10001
WORKDIR /home/prosparse
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["entrypoint"]
CMD ["serve", "/model"]
