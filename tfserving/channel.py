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
    # Leave out a server that is frozen, or whose machine is lost: see make_channel.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 4000),
    ("grpc.keepalive_timeout_ms", 4000),  # for TCP: of bytes that the other machine has not taken
    # No other pings. Python reads a connection only during calls, so that the answer to a ping
    # may be read too late where it comes after the last one.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.enable_http_proxy", 0),
]


def make_channel(target: str) -> grpc.Channel:
    """Return a channel that balances over a target's addresses and retries once.

    A process that is frozen keeps its connections, and its system still takes bytes for it. So
    gRPC asks for a sign of life, a ping, where nothing has come for a second during a call. After
    four more seconds without any it closes the connection. All calls on it are retried at another
    address at once, and the frozen one gets no more until it has answered a new connection.

    A server that is merely slow answers pings while its model computes, and so no call is made
    twice because of its length. TensorFlow Serving hangs up on clients who send more than two
    pings (and one in five minutes) while it has sent nothing: gRPC itself stops after two, until
    it has sent another request.

    In gRPC 1.85 `grpc.keepalive_timeout_ms` alone has no effect on pings.

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
