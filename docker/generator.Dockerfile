# The generator. Targets: mock (without torch and vLLM), cpu, cuda (vLLM's official image plus the generator).
# Named contexts, both empty by default: wheels (pip looks there first), certs (*.crt: additional trusted certificates).
ARG PYTHON_BASE=python:3.11-slim-bookworm
ARG CUDA_BASE=vllm/vllm-openai:v0.32.0

FROM scratch AS wheels
FROM scratch AS certs

# -- build stages: not part of the images --------------------------------------------------------------------------------

FROM ${PYTHON_BASE} AS build
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PIP_FIND_LINKS=/wheels PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    UV_FIND_LINKS=/wheels UV_LINK_MODE=copy \
    PATH=/opt/tandem/bin:/opt/build/bin:$PATH
RUN --mount=type=bind,from=certs,target=/certs \
    find /certs -name '*.crt' -exec cat {} + >> /etc/ssl/certs/ca-certificates.crt
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/requirements/build.txt,target=/build.txt \
    python3 -m venv /opt/build && /opt/build/bin/pip install --no-deps --require-hashes -r /build.txt && \
    python3 -m venv /opt/tandem

FROM build AS services
COPY services/protocol /services/protocol
COPY services/generator /services/generator
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist /services/protocol /services/generator

FROM build AS dependencies-mock
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/generator-mock.txt,target=/lock.txt \
    /install /lock.txt

# What both CPU images have. This stage and the one named base are the same in both Dockerfiles, so the images share a layer.
FROM build AS shared-cpu
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/shared-cpu.txt,target=/lock.txt \
    /install /lock.txt

# -- images --------------------------------------------------------------------------------------------------------------

FROM ${PYTHON_BASE} AS base
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=certs,target=/certs --mount=type=bind,source=docker/setup,target=/setup \
    /setup libnuma1

FROM base AS runtime
ENV PATH=/opt/tandem/bin:$PATH SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt HF_HOME=/cache HOME=/tmp \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=void \
    TANDEM__GENERATOR__HOST=0.0.0.0 TANDEM__GENERATOR__PORT=8000 TANDEM__SHARED__WEIGHTS_DIR=/opt/store
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --start-interval=2s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=8)"]
ENTRYPOINT ["tini", "--", "python3", "-m", "tandem_generator"]
CMD ["--config", "/project/config.yaml"]

FROM runtime AS mock
COPY --from=dependencies-mock /opt/tandem /opt/tandem
RUN --mount=type=bind,from=services,source=/dist,target=/dist pip install --no-cache-dir --no-index --no-deps /dist/*.whl
ENV TANDEM__GENERATOR__ENGINE=mock
LABEL org.opencontainers.image.title="Tandem generator (mock engine)" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001

# vLLM compiles part of its sampler even with enforce_eager, so the CPU build needs a compiler at run time.
FROM runtime AS cpu
COPY --from=shared-cpu /opt/tandem /opt/tandem
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get -qq update && apt-get -qq install --yes --no-install-recommends g++=4:*
# The packages are installed here, since a COPY from a build stage would contain the shared ones again.
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/generator-cpu.txt,target=/lock.txt \
    HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore /install /lock.txt
RUN --mount=type=bind,from=services,source=/dist,target=/dist pip install --no-cache-dir --no-index --no-deps /dist/*.whl
LABEL org.opencontainers.image.title="Tandem generator (vLLM on CPU)" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001

# vLLM's image has the packages that vLLM was released with. Only xxhash, which it may lack, comes from our lock.
FROM ${CUDA_BASE} AS cuda
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=certs,target=/certs --mount=type=bind,source=docker/setup,target=/setup \
    /setup
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/requirements/generator-cuda.txt,target=/lock.txt \
    --mount=type=bind,from=services,source=/dist,target=/dist \
    export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_FIND_LINKS=/wheels && \
    sed -n '/^xxhash==/,/[^\\]$/p' /lock.txt > /tmp/xxhash.txt && \
    python3 -m pip install --no-cache-dir --no-deps --require-hashes -r /tmp/xxhash.txt && \
    python3 -m pip install --no-cache-dir --no-index --no-deps /dist/*.whl && \
    rm /tmp/xxhash.txt && \
    python3 -c 'import tandem_generator.server, tandem_generator.options'
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt HF_HOME=/cache HOME=/tmp \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=void \
    TANDEM__GENERATOR__HOST=0.0.0.0 TANDEM__GENERATOR__PORT=8000 TANDEM__SHARED__WEIGHTS_DIR=/opt/store
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --start-interval=2s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=8)"]
ENTRYPOINT ["tini", "--", "python3", "-m", "tandem_generator"]
CMD ["--config", "/project/config.yaml"]
LABEL org.opencontainers.image.title="Tandem generator (vLLM on CUDA)" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001
