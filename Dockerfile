# docker build -t octavo .                                  for CPUs
# docker build -t octavo:cuda --build-arg VARIANT=cuda .    for GPUs
# How to run it: docs/deploy/docker.md.
ARG PYTHON=3.12
ARG VARIANT=cpu

# Debian keeps one version of a package: none is named (DL3008).
FROM python:${PYTHON}-slim AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY octavo octavo
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# CPU: torch without CUDA, and no compiler.
FROM python:${PYTHON}-slim AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX}

# CUDA: PyPI's torch brings CUDA and Triton, which builds its launchers with a C compiler.
FROM python:${PYTHON}-slim AS cuda
# What links a launcher stays: no optimisation at link time, sanitizers, static libraries, Perl.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
  /usr/lib/gcc/*/*/lto1 /usr/lib/gcc/*/*/lib*san* /usr/lib/*/lib*san.so* \
  /usr/bin/*lto-dump* /usr/bin/*ld.gold /usr/bin/*dwp /usr/lib/*/libgprofng* \
  /usr/lib/*/libc.a /usr/lib/*/libm-*.a /usr/lib/*/libmvec.a \
  /usr/share/perl/* /usr/lib/*/perl /usr/lib/*/libperl.so*

FROM ${VARIANT}
# Traces and tokens of issuers: options of the server that need packages of their own.
ARG EXTRAS=otel,jwt
COPY constraints.txt /tmp/constraints.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/*.whl)[${EXTRAS}]" \
 && rm /tmp/constraints.txt \
 && useradd --create-home --uid 10001 octavo
# The root file system may be read-only: what is made lies below the home, which is a volume.
USER 10001
ENV HOME=/home/octavo PYTHONDONTWRITEBYTECODE=1
VOLUME /home/octavo
WORKDIR /home/octavo
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["octavo"]
CMD ["serve", "demo-moe", "--host", "0.0.0.0", "--port", "8000"]
