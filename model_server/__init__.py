"""TensorFlow Serving's gRPC and REST API in Python, for machines without Docker.

    python -m model_server --model_name=clothing-model --model_base_path=build/clothing-model

Flags, status codes and JSON shapes are those of ``tensorflow_model_server``. Covered: Predict,
GetModelMetadata and GetModelStatus over gRPC; status, metadata and ``:predict`` over REST; versions
that come and go below the base path; warm-up; a shutdown that drains. Not covered: Classify,
Regress, MultiInference and HandleReloadConfigRequest, which answer UNIMPLEMENTED; version labels,
several models at once, batching and metrics, whose flags are accepted with a warning.

In two things it is stricter than TensorFlow Serving: the shape of an input must fit the one that
the signature declares, and an integer in JSON must fit its dtype.

``server`` starts and stops everything; ``manager`` knows the versions, ``servable`` is one of them;
``service`` answers requests, ``grpc_api`` and ``rest_api`` carry them; ``tensors`` and
``json_tensors`` turn what is on the wire into NumPy arrays and back.
"""
