"""Configuration files in protobuf's text format, whose messages are in no Python package."""

from pathlib import Path
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)

_MESSAGES = """
name: "model_server/text_protos.proto"
package: "tensorflow.serving"
syntax: "proto3"
dependency: "google/protobuf/wrappers.proto"
message_type {
  name: "BatchingParameters"
  field { name: "max_batch_size"       number: 1 type_name: ".google.protobuf.Int64Value" }
  field { name: "batch_timeout_micros" number: 2 type_name: ".google.protobuf.Int64Value" }
  field { name: "max_enqueued_batches" number: 3 type_name: ".google.protobuf.Int64Value" }
  field { name: "num_batch_threads"    number: 4 type_name: ".google.protobuf.Int64Value" }
  field { name: "thread_pool_name"     number: 5 type_name: ".google.protobuf.StringValue" }
  field { name: "allowed_batch_sizes"  number: 6 type: TYPE_INT64 label: LABEL_REPEATED }
  field { name: "pad_variable_length_inputs"   number: 7 type: TYPE_BOOL }
  field { name: "enable_large_batch_splitting" number: 8 type_name: ".google.protobuf.BoolValue" }
  field { name: "max_execution_batch_size"     number: 9 type_name: ".google.protobuf.Int64Value" }
}
message_type {
  name: "PrometheusConfig"
  field { name: "enable" number: 1 type: TYPE_BOOL }
  field { name: "path"   number: 2 type: TYPE_STRING }
}
message_type {
  name: "MonitoringConfig"
  field { name: "prometheus_config" number: 1 type_name: ".tensorflow.serving.PrometheusConfig" }
}
message_type {
  name: "SSLConfig"
  field { name: "server_key"    number: 1 type: TYPE_STRING }
  field { name: "server_cert"   number: 2 type: TYPE_STRING }
  field { name: "custom_ca"     number: 3 type: TYPE_STRING }
  field { name: "client_verify" number: 4 type: TYPE_BOOL }
}
"""

_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
_pool.Add(text_format.Parse(_MESSAGES, descriptor_pb2.FileDescriptorProto()))

BatchingParameters, MonitoringConfig, SSLConfig = (
    message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"tensorflow.serving.{name}"))
    for name in ("BatchingParameters", "MonitoringConfig", "SSLConfig")
)


def read(path: str | Path, message: Any) -> Any:
    """Fill ``message`` from a file and return it; raise ValueError with one sentence otherwise."""
    try:
        return text_format.Parse(Path(path).read_text(), message)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except text_format.ParseError as error:
        raise ValueError(
            f"{path}: Error parsing text-format {type(message).DESCRIPTOR.full_name}: "
            f"{str(error).strip()} (line:column)"
        ) from error
