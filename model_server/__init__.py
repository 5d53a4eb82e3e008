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
- warm-up from ``assets.extra``, new versions that take over without a failed request, batching, a
  shutdown that lets requests end.

``--prefer_tflite_model`` serves a version's ``model.tflite`` by LiteRT, if there is one. TensorFlow
is imported only when a SavedModel must be loaded, so such a server is ready in half a second. Where
it is not installed, versions without a ``model.tflite`` fail to load, and say what they need.

Models with operations of TensorFlow Text or Decision Forests, which TensorFlow Serving has linked
in, load where ``tensorflow_text`` or ``tensorflow_decision_forests`` is installed: the package is
imported when a model needs it.

Not covered: SessionRun, PredictStreamed and the profiler, which answer UNIMPLEMENTED; models for
other platforms; the ParseExample operation in TensorFlow Lite; base paths that are URIs; ALTS and
logging of requests. Flags without effect are accepted with a warning.

It differs from TensorFlow Serving in these points, most of which report a mistake sooner:

- a TensorFlow Lite model offers the signatures that converters write for LiteRT, too, each with a
  graph of its own; a request that comes alone runs on all cores;
- the shape of an input that is a placeholder must fit the one that its signature declares, and an
  integer in JSON must fit its dtype;
- HandleReloadConfigRequest answers after the first attempt to load a new model. When that fails, or
  there is nothing to load, the answer gives the reason, and the server goes on trying;
- a version that could not be loaded is tried again once its files have changed and two looks in a
  row have found them the same, however many attempts have failed;
- such a version is in state END between the attempts, where TensorFlow Serving stays in LOADING;
- batching lets requests that cannot be merged (scalars, unequal first dimensions, outputs without a
  row for each) run on their own, where TensorFlow Serving refuses them.

``server`` starts and stops everything; ``config`` reads which models to serve, ``manager`` knows
their versions, ``servable`` is one of them, ``saved_model`` or
``lite_model``; ``service`` answers requests, ``grpc_api`` and
``rest_api`` carry them; ``inference`` answers for lists of Examples, which ``json_examples`` reads;
``tensors`` and ``json_tensors`` turn what is on the wire into NumPy arrays and back, and
``json_workers`` has processes do so where it takes long; ``warmup`` replays stored requests,
``batching`` merges those that come together, ``metrics`` counts and times them;
``text_protos`` reads configuration files.
"""
