# latentd. CPU by default:
#   docker build -t latentd .
# NVIDIA GPU (the host needs a driver and the NVIDIA container toolkit):
#   docker build -t latentd:gpu --build-arg TORCH_INDEX= .
# torch's CUDA wheels carry the CUDA libraries, so the slim Python base serves a GPU too. BASE may be any Debian or
# Ubuntu with Python 3.11 or newer in its archive, a CUDA image for instance:
#   --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
# For builds that are the same on any day, name it by digest: BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

# The tag is the builder's to choose, here and in BASE.
# hadolint ignore=DL3006
FROM ${BASE} AS packages

# Where torch's wheels are looked for beside PyPI, whose own wheels for Linux bring CUDA. Empty for those, or
# https://download.pytorch.org/whl/cu126 and the like where the host's driver is older than they want.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Bases without Python get their distribution's.
# hadolint ignore=DL3008
RUN command -v python3 >/dev/null || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    }

# A fixed uid for volumes and policies, in passwd because torch asks for the user's name. /scratch is the one path
# that is written to beside the models; everything else may be read-only.
RUN groupadd --gid 10001 latentd \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /scratch --shell /usr/sbin/nologin latentd \
    && install -d -o latentd -g latentd -m 0700 /scratch

WORKDIR /opt/latentd
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# The dependencies first, gigabytes that change with pyproject.toml alone; app/__init__.py is there for the version.
# Of torch, what runs nothing here goes again: its C++ tests and headers, protoc, and the tests of its Python half.
COPY pyproject.toml LICENSE README.md ./
COPY deploy/latentd_build.py deploy/
COPY app/__init__.py app/
RUN pip install --no-cache-dir --disable-pip-version-check ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} . \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" \
    && find bin -type f ! -name torch_shm_manager -delete \
    && rm -rf include test

COPY app app
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall .

# What is in it, as CycloneDX: made by a tool that the image does not keep.
FROM packages AS contents
RUN python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir --disable-pip-version-check 'cyclonedx-bom>=7.5' \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/sbom.cdx.json /opt/venv/bin/python

FROM packages

COPY --from=contents /opt/sbom.cdx.json /opt/latentd/
COPY deploy/healthcheck.py /opt/latentd/
COPY --chown=latentd:latentd models /models
VOLUME /models

ENV HOME=/scratch \
    TMPDIR=/scratch \
    XDG_CACHE_HOME=/scratch/cache \
    TORCHINDUCTOR_CACHE_DIR=/scratch/inductor \
    LATENTD_MODELS=/models
WORKDIR /scratch
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "/opt/latentd/healthcheck.py"]

ENTRYPOINT ["latentd"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

# Last: they change with each build.
ARG BASE
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title=latentd \
      org.opencontainers.image.description="A service that turns pictures into VAE latents and latents into pictures" \
      org.opencontainers.image.licenses=MIT \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.base.name=${BASE}
