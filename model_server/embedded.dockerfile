# The Python model server with the exported model, for any CPU:
#
#   docker build --file model_server/embedded.dockerfile --tag clothing-model:001 .
#   docker run --rm --publish 127.0.0.1:8500:8500 --publish 127.0.0.1:8501:8501 clothing-model:001
#
# LiteRT runs the model's model.tflite, and TensorFlow is not there. A model that is nothing but a
# SavedModel needs it: --build-arg WITH_TENSORFLOW=1 adds it, and 2 GB.
#
# For the model in build/leaf-model, add --build-arg MODEL_NAME=leaf-model, and behind a package
# mirror --build-arg PIP_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11-slim
ARG MODEL_NAME=clothing-model

FROM ${PYTHON_IMAGE} AS model
ARG MODEL_NAME
COPY . /context
RUN test -d "/context/build/${MODEL_NAME}/1" \
    || { echo "There is no build/${MODEL_NAME}/1: make workbook ONLY=01 exports it, and only folders" \
        "that end in -model reach Docker." >&2; exit 1; }

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIPENV=2026.10.3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIPENV_VENV_IN_PROJECT=1 PIPENV_NOSPIN=1
RUN python -m venv /pipenv && /pipenv/bin/pip install --quiet "pipenv==${PIPENV}"
WORKDIR /app
COPY Pipfile Pipfile.lock ./
ARG WITH_TENSORFLOW
RUN /pipenv/bin/pipenv requirements --hash \
        --categories "model-server${WITH_TENSORFLOW:+ model-server-tensorflow}" > requirements.txt \
    && python -m venv --without-pip .venv \
    && /pipenv/bin/pip --python .venv/bin/python install --quiet --only-binary=:all: \
        --no-deps --require-hashes --requirement requirements.txt \
    && /pipenv/bin/pip --python .venv/bin/python check
# Half of LiteRT is for graphics cards and for the processors of phones.
RUN rm -rf .venv/lib/*/site-packages/ai_edge_litert/libLiteRtWebGpuAccelerator.so \
    .venv/lib/*/site-packages/ai_edge_litert/tools .venv/lib/*/site-packages/ai_edge_litert/vendors

# What serves strangers has no use for manuals, translations, and a program that installs software.
FROM ${PYTHON_IMAGE} AS base
RUN rm -rf /usr/share/locale /usr/share/man \
    && python -c "import pip, shutil; shutil.rmtree(pip.__path__[0])"

# What one layer removes is still in those below it, so this image has none of them.
FROM scratch
# hadolint ignore=DL3067
COPY --from=base / /
LABEL org.opencontainers.image.title="model" \
      org.opencontainers.image.description="TensorFlow Serving's API in Python, with one model" \
      org.opencontainers.image.licenses="MIT"
ENV PATH=/app/.venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY --from=packages /app/.venv .venv
COPY --chown=10001:10001 model_server/monitoring.config /etc/serving/
COPY --chown=10001:10001 tfserving tfserving
COPY --chown=10001:10001 model_server/*.py model_server/
ARG MODEL_NAME
COPY --chown=10001:10001 --from=model /context/build/${MODEL_NAME} /models/${MODEL_NAME}
ENV MODEL_NAME=${MODEL_NAME}
USER 10001:10001
EXPOSE 8500 8501
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8501 && printf 'GET /v1/models/%s HTTP/1.0\\r\\n\\r\\n' \"$MODEL_NAME\" >&3 && grep -q AVAILABLE <&3"]
# The shell knows the model's name, and exec makes the server process 1 in its place.
ENTRYPOINT ["bash", "-c", "exec python -m model_server --model_name=\"$MODEL_NAME\" --model_base_path=\"/models/$MODEL_NAME\" \"$@\"", "serve"]
# Without batching: on CPUs, LiteRT runs pictures one by one sooner than many at a time. 16 clients
# got 1.5 times as many answers.
CMD ["--port=8500", "--rest_api_port=8501", "--prefer_tflite_model=true", \
     "--monitoring_config_file=/etc/serving/monitoring.config", \
     "--enable_grpc_healthcheck_service=true", \
     "--grpc_channel_arguments=grpc.max_connection_age_ms=30000"]
