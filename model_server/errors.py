"""The error that answers a request, or that a version of a model could not be loaded for."""

import grpc


class ServingError(Exception):
    """A gRPC status code with a message; REST answers with the HTTP status that belongs to it."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def invalid_argument(message: str) -> ServingError:
    """Make the error for a request that is wrong whatever state the server is in."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def status_code(number: int) -> grpc.StatusCode:
    """Turn the number of a status, which TensorFlow and gRPC share, into gRPC's enumeration."""
    return next(
        (code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN
    )
