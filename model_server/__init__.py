"""TensorFlow Serving's gRPC and REST API in Python, for machines without Docker.

    python -m model_server --model_name=clothing-model --model_base_path=build/clothing-model

Flags, status codes, messages and JSON shapes are those of ``tensorflow_model_server``. Covered:

- gRPC: Predict, Classify, Regress, MultiInference, GetModelMetadata, GetModelStatus and
  HandleReloadConfigRequest; grpc.health.v1 with ``--enable_grpc_healthcheck_service``;
- REST: status and metadata; ``:predict`` in row and column form, ``:classify``, ``:regress``; of a
  model, of a version, of a label; Prometheus metrics;
- one model by name and base path, or several from ``--model_config_file``, with version policies
  and labels; both the file and the base paths are followed while the server runs;
- gRPC over TLS and over a UNIX socket; REST with gzipped bodies and CORS;
- warm-up from ``assets.extra``, a takeover without a failed request, batching, a shutdown that
  drains.

Not covered: SessionRun, PredictStreamed and the profiler, which answer UNIMPLEMENTED; models for
other platforms and TensorFlow Lite; base paths that are URIs; ALTS and logging of requests. Flags
without effect are accepted with a warning.

In these things it departs from TensorFlow Serving, each time to say sooner what is wrong:

- the shape of an input that is a placeholder must fit the one that its signature declares, and an
  integer in JSON must fit its dtype;
- GetModelStatus for a label tells of the version that the label points to, as the REST API's
  documentation has it, and not of all versions;
- HandleReloadConfigRequest answers after the first attempt to load a new model: where that fails,
  or there is nothing to load, with the reason. The model is served as soon as it can be;
- a version that could not be loaded gets another attempt as soon as its files have changed, then
  stayed the same between two looks, however many attempts have failed;
- such a version is in state END between the attempts, where TensorFlow Serving stays in LOADING;
- batching runs alone what cannot be merged (scalars, unequal first dimensions, outputs without a
  row for each), where TensorFlow Serving refuses it.

``server`` starts and stops everything; ``config`` reads which models to serve, ``manager`` knows
their versions, ``servable`` is one of them; ``service`` answers requests, ``grpc_api`` and
``rest_api`` carry them; ``inference`` answers for lists of Examples; ``tensors`` and
``json_tensors`` turn what is on the wire into NumPy arrays and back; ``warmup`` replays stored
requests, ``batching`` merges those that come together, ``metrics`` counts and times them;
``text_protos`` reads configuration files.
"""
