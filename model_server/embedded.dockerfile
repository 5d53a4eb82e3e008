# The Python model server with the exported model, for any CPU that TensorFlow has wheels for:
#
#   docker build --file model_server/embedded.dockerfile --tag clothing-model:001 .
#   docker run --rm --publish 127.0.0.1:8500:8500 --publish 127.0.0.1:8501:8501 clothing-model:001
#
# build/clothing-model/1 must be there: lesson 01 makes it. Behind a package mirror, add
# --build-arg PIP_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIPENV=2026.10.3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIPENV_VENV_IN_PROJECT=1 PIPENV_NOSPIN=1
RUN python -m venv /opt/pipenv && /opt/pipenv/bin/pip install --quiet "pipenv==${PIPENV}"
WORKDIR /app
COPY Pipfile Pipfile.lock ./
RUN /opt/pipenv/bin/pipenv --python "$(command -v python3)" sync --categories="model-server"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="clothing-model" \
      org.opencontainers.image.description="TensorFlow Serving's API in Python, with the clothing model"
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY --from=packages /app/.venv .venv
COPY model_server model_server
COPY build/clothing-model /models/clothing-model
USER 10001:10001
EXPOSE 8500 8501
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request as u; assert b'AVAILABLE' in u.urlopen('http://localhost:8501/v1/models/clothing-model').read()"]
ENTRYPOINT ["python", "-m", "model_server"]
CMD ["--port=8500", "--rest_api_port=8501", "--model_name=clothing-model", "--model_base_path=/models/clothing-model"]
