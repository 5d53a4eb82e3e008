"""A channel to one model server or several, with retries, balancing and keepalive."""

import json
import socket

import grpc

# gRPC's service config: https://grpc.io/docs/guides/service-config/
SERVICE_CONFIG = {
    # Spread requests over all addresses of a name; by default all would go to the first.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # Asking again is safe, because predictions change nothing. UNAVAILABLE: no server
                # took the request. CANCELLED: a server took it that was about to end.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
}

OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    # A request is kept for its retry up to this size; the default of 256 KB is less than a picture.
    ("grpc.per_rpc_retry_buffer_size", 1 << 28),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Notice soon when a server comes back, or when a name gets new addresses.
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    # Leave out a server that hangs, or whose machine is lost. Servers tolerate no more than two
    # pings within a call, so this time should not be much shorter.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
]


def make_channel(target: str) -> grpc.Channel:
    """Return a channel that balances over a target's addresses and retries once.

    Args:
        target: ``host:port``, or a gRPC target such as ``dns:///name:port``, whose addresses may
            change, or several ``host:port`` separated by commas, which are looked up only now.

    Raises:
        OSError: A host in a list with commas is unknown.
    """
    if "," in target:
        addresses = [address.strip().rsplit(":", 1) for address in target.split(",")]
        found = [f"{socket.gethostbyname(host)}:{port}" for host, port in addresses]
        target = f"ipv4:{','.join(found)}"
    return grpc.insecure_channel(target, OPTIONS)
