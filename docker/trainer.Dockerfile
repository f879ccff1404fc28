# The trainer. Targets: cpu, cuda (torch's wheels contain CUDA; the host provides the driver), and for TRL scripts trl-cpu,
# trl-cuda: the same with TRL. None has vLLM.
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
COPY services/rollout /services/rollout
COPY services/trainer /services/trainer
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist /services/*

# What both CPU images have. This stage and the one named base are the same in both Dockerfiles, so the images share a layer.
FROM build AS shared-cpu
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/shared-cpu.txt,target=/lock.txt \
    /install /lock.txt

FROM build AS dependencies-cuda
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/trainer-cuda.txt,target=/lock.txt \
    /install /lock.txt

# -- images --------------------------------------------------------------------------------------------------------------

FROM ${PYTHON_BASE} AS base
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=certs,target=/certs --mount=type=bind,source=docker/setup,target=/setup \
    /setup libnuma1

FROM base AS runtime
ENV PATH=/opt/tandem/bin:$PATH SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt HF_HOME=/cache HOME=/tmp \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_VISIBLE_DEVICES=void \
    HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 \
    TANDEM__TRAINER__OUTPUT_DIR=/runs TANDEM__SHARED__WEIGHTS_DIR=/weights
# The trainer has no port to check. Its progress is in /runs, its result is the exit code.
HEALTHCHECK NONE
ENTRYPOINT ["tini", "--", "python3", "-m", "tandem_trainer.launch"]
CMD ["--config", "/project/config.yaml"]

FROM runtime AS trainer-cpu
COPY --from=shared-cpu /opt/tandem /opt/tandem
# The packages are installed here, since a COPY from a build stage would contain the shared ones again.
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/trainer-cpu.txt,target=/lock.txt \
    HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore /install /lock.txt
RUN --mount=type=bind,from=services,source=/dist,target=/dist pip install --no-cache-dir --no-index --no-deps /dist/*.whl
COPY docker/*.py /opt/

# The packages of the project, without those that the image has. The compiler that some need is not part of the image.
FROM trainer-cpu AS packages-cpu
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels PIP_CACHE_DIR=/root/.cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=
ARG REQUIREMENTS
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=wheels,target=/wheels --mount=type=bind,from=requirements,target=/requirements \
    --mount=type=bind,source=docker/install_project.py,target=/install_project.py \
    python3 /install_project.py /requirements /opt/project "$REQUIREMENTS"

FROM trainer-cpu AS cpu
COPY --from=packages-cpu /opt/project /opt/tandem
LABEL org.opencontainers.image.title="Tandem trainer (CPU)" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001

# TRL for a script, unless the project's requirements brought a version of their own.
FROM cpu AS trl-cpu
USER 0:0
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/requirements/trainer-trl.txt,target=/lock.txt \
    pip show --quiet trl 2>/dev/null || HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore \
    pip install --no-cache-dir --no-deps --require-hashes -r /lock.txt
ENV TANDEM_SCRIPT_FOLDER=/project
LABEL org.opencontainers.image.title="Tandem trainer with TRL (CPU)"
USER 10001:10001

FROM runtime AS trainer-cuda
COPY --from=dependencies-cuda /opt/tandem /opt/tandem
RUN --mount=type=bind,from=services,source=/dist,target=/dist pip install --no-cache-dir --no-index --no-deps /dist/*.whl
COPY docker/*.py /opt/

# The packages of the project, without those that the image has. The compiler that some need is not part of the image.
FROM trainer-cuda AS packages-cuda
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels PIP_CACHE_DIR=/root/.cache/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=
ARG REQUIREMENTS
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=type=bind,from=wheels,target=/wheels --mount=type=bind,from=requirements,target=/requirements \
    --mount=type=bind,source=docker/install_project.py,target=/install_project.py \
    python3 /install_project.py /requirements /opt/project "$REQUIREMENTS"

FROM trainer-cuda AS cuda
COPY --from=packages-cuda /opt/project /opt/tandem
# The CUDA version of the lock. `tandem doctor` compares it with the driver.
ENV CUDA_VERSION=13.0
LABEL org.opencontainers.image.title="Tandem trainer (CUDA)" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER 10001:10001

# TRL for a script, unless the project's requirements brought a version of their own.
FROM cuda AS trl-cuda
USER 0:0
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/requirements/trainer-trl.txt,target=/lock.txt \
    pip show --quiet trl 2>/dev/null || HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore \
    pip install --no-cache-dir --no-deps --require-hashes -r /lock.txt
ENV TANDEM_SCRIPT_FOLDER=/project
LABEL org.opencontainers.image.title="Tandem trainer with TRL (CUDA)"
USER 10001:10001
