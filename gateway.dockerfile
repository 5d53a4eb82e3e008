# The gateway: Python, the locked packages of [packages] in Pipfile, the code, and the description of
# the model that it asks. No TensorFlow.
#
#   docker build --file gateway.dockerfile --tag clothing-gateway:001 .
#   docker run --rm --publish 127.0.0.1:9696:9696 --env TF_SERVING_HOST=... clothing-gateway:001
#
# For the model in build/leaf-model, add --build-arg MODEL_NAME=leaf-model, and behind a package
# mirror --build-arg PIP_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11-slim
ARG MODEL_NAME=clothing-model

FROM ${PYTHON_IMAGE} AS model
ARG MODEL_NAME
COPY . /context
RUN test -f "/context/build/${MODEL_NAME}/1/assets.extra/model.json" \
    || { echo "There is no build/${MODEL_NAME}/1/assets.extra/model.json: make workbook ONLY=01" \
        "exports it, and only folders that end in -model reach Docker." >&2; exit 1; }

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIPENV=2026.10.3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIPENV_VENV_IN_PROJECT=1 PIPENV_NOSPIN=1
RUN python -m venv /pipenv && /pipenv/bin/pip install --quiet "pipenv==${PIPENV}"
WORKDIR /app
COPY Pipfile Pipfile.lock ./
RUN /pipenv/bin/pipenv requirements --hash > requirements.txt \
    && python -m venv --without-pip .venv \
    && /pipenv/bin/pip --python .venv/bin/python install --quiet --only-binary=:all: \
        --no-deps --require-hashes --requirement requirements.txt \
    && /pipenv/bin/pip --python .venv/bin/python check

# What serves strangers has no use for manuals, translations, and a program that installs software.
FROM ${PYTHON_IMAGE} AS base
RUN rm -rf /usr/share/locale /usr/share/man \
    && python -c "import pip, shutil; shutil.rmtree(pip.__path__[0])"

# What one layer removes is still in those below it, so this image has none of them.
FROM scratch
# hadolint ignore=DL3067
COPY --from=base / /
LABEL org.opencontainers.image.title="gateway" \
      org.opencontainers.image.description="Pictures in over HTTP, class probabilities out" \
      org.opencontainers.image.licenses="MIT"
# Large uploads pass through a file. /dev/shm can be written to even where the root is read-only.
# Where Linux has large pages, pixels are quicker in them; gunicorn.conf.py sets the rest of malloc.
ENV PATH=/app/.venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/dev/shm \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1
WORKDIR /app
COPY --from=packages /app/.venv .venv
COPY --chown=10001:10001 website website
COPY --chown=10001:10001 tfserving tfserving
COPY --chown=10001:10001 description.py gateway.py links.py pictures.py web.py worker.py gunicorn.conf.py ./
ARG MODEL_NAME
COPY --chown=10001:10001 --from=model /context/build/${MODEL_NAME}/1/assets.extra/model.json /app/model.json
# The counts for Prometheus have a port of their own, which is not for publishing.
ENV MODEL_DESCRIPTION=/app/model.json METRICS_PORT=9697
USER 10001:10001
EXPOSE 9696 9697
HEALTHCHECK --interval=5s --timeout=5s --start-period=10s CMD ["python", "-c", "from http.client import HTTPConnection as H; h = H('127.0.0.1', 9696); h.request('GET', '/livez'); assert h.getresponse().status == 200"]
CMD ["gunicorn", "--bind=0.0.0.0:9696", "--worker-tmp-dir=/dev/shm", "gateway:app"]
