"""Which models to serve: TensorFlow Serving's ``ModelServerConfig``, read and checked."""

import os
from typing import Any

import grpc

from tfserving import server_messages_pb2 as pb

from . import text_protos
from .errors import ServingError, invalid_argument

PLATFORM = "tensorflow"
EXPECTED = (
    'it should read like model_config_list { config { name: "clothing-model" '
    'base_path: "/models/clothing-model" model_platform: "tensorflow" } }'
)


def read(file: str) -> Any:
    """Read a ``ModelServerConfig`` in text format; raise ValueError with one sentence otherwise."""
    try:
        config = text_protos.read(file, pb.ModelServerConfig())
        check(config)
    except (ValueError, ServingError) as error:
        where = "" if file in str(error) else f"{file}: "
        raise ValueError(f"--model_config_file: {where}{error}; {EXPECTED}") from error
    return config


def single_model(name: str, base_path: str) -> Any:
    """Make the ``ModelServerConfig`` that ``--model_name`` and ``--model_base_path`` stand for.

    Raises ServingError when the base path is a URI.
    """
    config = pb.ModelServerConfig()
    config.model_config_list.config.add(
        name=name,
        base_path=base_path if "://" in base_path else os.path.abspath(base_path),
        model_platform=PLATFORM,
    )
    check(config)
    return config


def listed(config: Any) -> dict[str, Any]:
    """Map the name of each model in a ``ModelServerConfig`` to its ``ModelConfig``."""
    return {model.name: model for model in config.model_config_list.config}


def check(config: Any, current: Any = None) -> None:
    """Raise ServingError unless a server can go from the config ``current`` to ``config``."""
    kind, kind_before = (
        each.WhichOneof("config") if each is not None else None for each in (config, current)
    )
    if kind_before and kind != kind_before:
        raise ServingError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "Cannot transition to requested config. It is only legal to transition from one "
            "ModelConfigList to another.",
        )
    if kind == "custom_model_config":
        raise invalid_argument("ModelServer does not yet support custom model config.")
    names = set()
    for model in config.model_config_list.config:
        if model.name in names:
            raise invalid_argument(
                f"Illegal to list model {model.name} multiple times in config list"
            )
        names.add(model.name)
    for model in config.model_config_list.config:
        if "://" in model.base_path:
            raise invalid_argument(
                f"the base path of model {model.name} is a URI, {model.base_path}: this model "
                "server reads folders only"
            )
        if not os.path.isabs(model.base_path):
            raise invalid_argument(
                f"Expected model {model.name} to have an absolute path or URI; "
                f"got base_path()={model.base_path}"
            )
    for model in config.model_config_list.config:
        if (platform := _platform(model)) != PLATFORM:
            raise invalid_argument(f"Model {model.name} requests unsupported platform {platform}")


def _platform(model: Any) -> str:
    if model.model_type:
        if model.model_platform:
            raise invalid_argument(
                "Illegal setting both ModelServerConfig::model_type (deprecated) and "
                "ModelServerConfig::model_platform."
            )
        if model.model_type != pb.TENSORFLOW:
            raise invalid_argument(
                f"ModelServerConfig::model_type choice {model.model_type} not supported."
            )
        return PLATFORM
    if not model.model_platform:
        raise invalid_argument(
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            "ModelServerConfig::model_platform."
        )
    return model.model_platform
