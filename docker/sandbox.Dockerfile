# syntax=docker/dockerfile:1
# The code sandbox alone: a stateful interpreter for code that is not trusted.
#
#   docker build -f docker/sandbox.Dockerfile -t elpo-sandbox:0.1.0 .
#   docker run --rm -i --network none --read-only --tmpfs /tmp --cap-drop ALL \
#     --security-opt no-new-privileges --pids-limit 512 --memory 4g elpo-sandbox:0.1.0
#
# An ordinary user, no network, no capability: Landlock and seccomp do the rest (tier standard).

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements/sandbox.txt /tmp/sandbox.txt
RUN python -m venv /opt/venv && /opt/venv/bin/python -m pip install --requirement /tmp/sandbox.txt

FROM python:3.11.14-slim-bookworm AS sandbox
LABEL org.opencontainers.image.title="elpo_ray sandbox" org.opencontainers.image.version="0.1.0"
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --no-create-home --uid 1000 sandbox
COPY --from=build /opt/venv /opt/venv
COPY sandbox /opt/elpo_ray/sandbox
WORKDIR /opt/elpo_ray
USER 1000
HEALTHCHECK --interval=5m --timeout=60s CMD ["python", "-m", "sandbox.check"]
ENTRYPOINT ["python", "-m", "sandbox"]
CMD ["numpy", "sympy"]
