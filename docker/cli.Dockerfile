# The `tandem` command without torch, in two images:
#   watch  the page of `tandem watch`, as a user without rights
#   cli    for `docker compose run --rm tandem doctor`: with Docker's own client, since the doctor asks Compose for the
#          merged configuration
# Named contexts, both empty by default: wheels (pip looks there first), certs (*.crt: additional trusted certificates).
ARG PYTHON_BASE=python:3.11-slim-bookworm
ARG DOCKER_CLI_BASE=docker:28-cli

FROM scratch AS wheels
FROM scratch AS certs
FROM ${DOCKER_CLI_BASE} AS docker-cli

FROM ${PYTHON_BASE} AS base
# Not in /opt, since the checkout is mounted at the path that it has on the host.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PYTHONPATH=/usr/lib/tandem/source PATH=/usr/lib/tandem/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=certs,target=/certs \
    find /certs -name '*.crt' -exec cat {} + >> /etc/ssl/certs/ca-certificates.crt
# An empty volume gets the owner of this folder, so that the trainer can write it.
RUN mkdir --mode=0755 /runs && chown 10001:10001 /runs
ENV HOME=/tmp
ENTRYPOINT ["python3", "-m", "tandem_cli"]
CMD ["--help"]

FROM base AS watch
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/watch.txt,target=/lock.txt \
    python3 -m venv /usr/lib/tandem/venv && \
    HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore /install /lock.txt
COPY services/protocol/tandem_protocol /usr/lib/tandem/source/tandem_protocol
COPY cli/tandem_cli /usr/lib/tandem/source/tandem_cli
USER 10001:10001
LABEL org.opencontainers.image.title="The page of tandem watch" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}

FROM base AS cli
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install,target=/install \
    --mount=type=bind,source=docker/requirements/cli.txt,target=/lock.txt \
    python3 -m venv /usr/lib/tandem/venv && \
    HOME=/root PIP_CERT=$SSL_CERT_FILE PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore /install /lock.txt
COPY --from=docker-cli /usr/local/bin/docker /usr/local/bin/docker
COPY --from=docker-cli /usr/local/libexec/docker/cli-plugins/docker-compose /usr/local/libexec/docker/cli-plugins/
COPY services/protocol/tandem_protocol /usr/lib/tandem/source/tandem_protocol
COPY cli/tandem_cli /usr/lib/tandem/source/tandem_cli
LABEL org.opencontainers.image.title="Tandem's command line" org.opencontainers.image.licenses=Apache-2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
