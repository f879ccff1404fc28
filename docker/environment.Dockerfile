# A server of the project's tools and environments: without torch, vLLM and the trainer. Target: environment.
# Named contexts, empty by default: wheels (pip looks there first), certs (*.crt: additional trusted certificates),
# project (its requirements.txt becomes a layer of the image).
ARG PYTHON_BASE=python:3.11-slim-bookworm

FROM scratch AS wheels
FROM scratch AS certs
FROM scratch AS project

# Only these files of the project are sent to the build. None has to exist.
FROM scratch AS requirements
ARG REQUIREMENTS
COPY --from=project ${REQUIREMENTS:-requirements.txt}* requirements*.txt constraints*.txt /

# -- build stages: not part of the image ---------------------------------------------------------------------------------

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
COPY services/rollout /services/rollout
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist /services/*

FROM build AS dependencies
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/environment.txt,target=/lock.txt \
    /install /lock.txt

# -- image ---------------------------------------------------------------------------------------------------------------

FROM ${PYTHON_BASE} AS base
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=certs,target=/certs --mount=type=bind,source=docker/setup,target=/setup \
    /setup libnuma1

FROM base AS runtime
ENV PATH=/opt/tandem/bin:$PATH SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt HF_HOME=/cache HOME=/tmp \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=void \
    HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 \
    TANDEM__TRAINER__ROLLOUT__ENVIRONMENT_SERVER__HOST=0.0.0.0 \
    TANDEM__TRAINER__ROLLOUT__ENVIRONMENT_SERVER__PORT=8100
COPY --from=dependencies /opt/tandem /opt/tandem
RUN --mount=type=bind,from=services,source=/dist,target=/dist pip install --no-cache-dir --no-index --no-deps /dist/*.whl
EXPOSE 8100
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --start-interval=2s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8100/healthz', timeout=8)"]
ENTRYPOINT ["tini", "--", "python3", "-m", "tandem_rollout.server"]
CMD ["--config", "/project/config.yaml"]

# The packages of the project, without those that the image has. The compiler that some need is not part of the image.
FROM runtime AS packages
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels PIP_CACHE_DIR=/root/.cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=
ARG REQUIREMENTS
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=wheels,target=/wheels --mount=type=bind,from=requirements,target=/requirements \
    --mount=type=bind,source=docker/install_project.py,target=/install_project.py \
    python3 /install_project.py /requirements /opt/project "$REQUIREMENTS"

FROM runtime AS environment
COPY --from=packages /opt/project /opt/tandem
LABEL org.opencontainers.image.title="Tandem environment" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001
