"""Configuration files in protobuf's text format."""

from pathlib import Path
from typing import Any

from google.protobuf import text_format


def read(path: str | Path, message: Any) -> Any:
    """Fill ``message`` from a file and return it; raise ValueError with one sentence otherwise."""
    try:
        return text_format.Parse(Path(path).read_text(), message)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except text_format.ParseError as error:
        kind = f"tensorflow.serving.{type(message).DESCRIPTOR.name}"  # as TensorFlow calls it
        raise ValueError(
            f"{path}: Error parsing text-format {kind}: {str(error).strip()} (line:column)"
        ) from error
