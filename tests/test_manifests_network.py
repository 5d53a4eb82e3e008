"""Who reaches whom: the NetworkPolicies of kube-config/, followed rule by rule."""

import itertools
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from helpers.manifests import (
    KUBE,
    clothes,
    namespace_of,
    of_kind,
    pod_labels,
    read,
    render,
    selects,
)
from hypothesis import given
from hypothesis import strategies as st

import links

__all__ = ["clothes", "render"]  # fixtures


class End(NamedTuple):
    """An end of a connection: a pod, or an address outside the cluster."""

    address: str
    namespace: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012


def matches_peer(peer: dict, end: End, home: str) -> bool:
    """Whether a peer of a rule, in a policy of the namespace ``home``, means this end."""
    if block := peer.get("ipBlock"):
        address = ip_address(end.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(each) for each in block.get("except", [])
        )
    if not end.namespace:
        return False
    labels = {"kubernetes.io/metadata.name": end.namespace}
    here = end.namespace == home
    if "namespaceSelector" in peer:
        here = selects(peer["namespaceSelector"], labels)
    return here and selects(peer.get("podSelector", {}), end.labels)


def let_through(
    policies: list[dict], end: End, other: End, direction: str, port: int, protocol: str
) -> bool:
    """Whether the policies of one end let it connect (Egress), or be connected to (Ingress)."""
    mine = [
        each
        for each in policies
        if each["metadata"]["namespace"] == end.namespace
        and selects(each["spec"]["podSelector"], end.labels)
        and direction in each["spec"]["policyTypes"]
    ]
    if not mine:
        return True
    side = "to" if direction == "Egress" else "from"
    for policy in mine:
        for rule in policy["spec"].get(direction.lower(), []):
            wanted = [(each["port"], each.get("protocol", "TCP")) for each in rule.get("ports", [])]
            peers = rule.get(side, [])
            if (not wanted or (port, protocol) in wanted) and (
                not peers or any(matches_peer(peer, other, end.namespace) for peer in peers)
            ):
                return True
    return False


def reaches(objects: list[dict], source: End, target: End, port: int, protocol: str) -> bool:
    policies = [*of_kind(objects, "NetworkPolicy").values()]
    return let_through(policies, source, target, "Egress", port, protocol) and let_through(
        policies, target, source, "Ingress", port, protocol
    )


def ends(objects: list[dict]) -> dict[str, End]:
    """Everybody in the picture, and those who are not."""
    deployments, home = of_kind(objects, "Deployment"), namespace_of(objects)
    return {
        "gateway": End("10.244.1.1", home, pod_labels(deployments["gateway"])),
        "model-server": End("10.244.1.2", home, pod_labels(deployments["model-server"])),
        "stranger here": End("10.244.1.3", home, {"app.kubernetes.io/name": "stranger"}),
        "stranger": End("10.244.1.4", "default", pod_labels(deployments["gateway"])),
        "prometheus": End("10.244.1.5", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
        "dns": End("10.244.1.6", "kube-system", {"k8s-app": "kube-dns"}),
        "dns elsewhere": End("10.244.1.7", "default", {"k8s-app": "kube-dns"}),
        "controller": End("10.244.1.8", "kube-system", {"k8s-app": "controller"}),
        "dns on the node": End("169.254.20.10"),
        "metadata": End("169.254.169.254"),
        "metadata 6": End("fd00:ec2::254"),
        "API server": End("10.96.0.1"),
        "load balancer": End("192.168.1.7"),
        "public": End("93.184.215.14"),
        "public 6": End("2606:4700:4700::1111"),
    }


PORTS = (22, 25, 53, 80, 443, 6443, 8080, 8500, 8501, 9696, 9697, 10250)
PROTOCOLS = ("TCP", "UDP", "SCTP")
Edges = set[tuple[str, str, int, str]]


def edges(objects: list[dict]) -> Edges:
    """Every connection of the namespace's pods that the policies let through."""
    everybody, home = ends(objects), namespace_of(objects)
    return {
        (source, target, port, protocol)
        for source, target in itertools.permutations(everybody, 2)
        if home in (everybody[source].namespace, everybody[target].namespace)
        for port, protocol in itertools.product(PORTS, PROTOCOLS)
        if reaches(objects, everybody[source], everybody[target], port, protocol)
    }


def picture(objects: list[dict]) -> Edges:
    """The connections that there should be."""
    home = namespace_of(objects)
    outside = [name for name, end in ends(objects).items() if end.namespace != home]
    return {
        *((name, "gateway", 9696, "TCP") for name in outside),
        ("gateway", "model-server", 8500, "TCP"),
        *(("gateway", name, port, "TCP") for name in ("public", "public 6") for port in (80, 443)),
        *(
            ("gateway", name, 53, protocol)
            for name in ("dns", "dns on the node")
            for protocol in ("TCP", "UDP")
        ),
    }


def test_policies_admit_exactly_the_edges_of_the_picture(clothes: list[dict]) -> None:
    assert edges(clothes) == picture(clothes)


def test_model_servers_let_gateways_in_whoever_else_could_get_out(clothes: list[dict]) -> None:
    everybody = ends(clothes)
    policies = [*of_kind(clothes, "NetworkPolicy").values()]
    admitted = {
        (name, port, protocol)
        for (name, end), port, protocol in itertools.product(everybody.items(), PORTS, PROTOCOLS)
        if let_through(policies, everybody["model-server"], end, "Ingress", port, protocol)
    }
    assert admitted == {("gateway", 8500, "TCP")}


def test_every_port_says_its_protocol(clothes: list[dict]) -> None:
    """The API server would add it, and whoever applies again would be told of a change."""
    policies = [*of_kind(clothes, "NetworkPolicy").values()]
    policies.append(read(KUBE / "prometheus/prometheus-networkpolicy.yaml"))
    for policy in policies:
        rules = policy["spec"].get("ingress", []) + policy["spec"].get("egress", [])
        for rule in rules:
            assert all("protocol" in port for port in rule["ports"]), policy["metadata"]["name"]


def test_prometheus_gets_to_the_metrics_and_nobody_else_does(clothes: list[dict]) -> None:
    policy = read(KUBE / "prometheus/prometheus-networkpolicy.yaml")
    policy["metadata"]["namespace"] = namespace_of(clothes)
    both = itertools.product(("gateway", "model-server"), (9697, 8501))  # each listens at one
    more = {("prometheus", name, port, "TCP") for name, port in both}
    assert edges([*clothes, policy]) == picture(clothes) | more


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether the gateway's own check of links lets this address pass."""
    if address.version == 6 and address not in links.PUBLIC_IPV6:
        return False
    ranges = (*links.NOT_PUBLIC, *links.ip_filter.EXTRA_BLOCKED_NET_RANGES)
    blocked = any(address.version == each.version and address in each for each in ranges)
    return not (address.is_private or address.is_multicast or blocked)


def gateway_fetches_from(objects: list[dict], address: IPv4Address | IPv6Address) -> bool:
    source = ends(objects)["gateway"]
    found = {port: reaches(objects, source, End(str(address)), port, "TCP") for port in PORTS}
    allowed = {port for port in PORTS if found[port]} - {53}
    assert allowed in ({80, 443}, set())
    return bool(allowed)


def borders(objects: list[dict]) -> Iterator[IPv4Address | IPv6Address]:
    """The first and last address of every block of the gateway's policy, and their neighbours."""
    rules = of_kind(objects, "NetworkPolicy")["gateway"]["spec"]["egress"]
    for peer in itertools.chain.from_iterable(rule["to"] for rule in rules):
        if block := peer.get("ipBlock"):
            for text in [block["cidr"], *block.get("except", [])]:
                network = ip_network(text)
                for number in (int(network[0]) - 1, int(network[0]), int(network[-1])):
                    yield type(network[0])(max(0, number))
                if int(network[-1]) < 2**network.max_prefixlen - 1:
                    yield network[-1] + 1


def test_the_policy_blocks_the_addresses_that_the_gateway_blocks(render: Callable) -> None:
    objects = render("base")
    for address in borders(objects):
        if address.version == 4:
            assert gateway_fetches_from(objects, address) == is_public(address), address
        else:  # of the few blocks within 2001::/23 that are public, none has pictures
            assert gateway_fetches_from(objects, address) <= is_public(address), address
    hosts = (Path(__file__).parent / "hostile/private-hosts.txt").read_text().split()
    found = []
    for host in hosts:
        try:
            found.append(ip_address(host.strip("[]")))
        except ValueError:
            continue  # a name, or another notation
        assert not gateway_fetches_from(objects, found[-1]), host
    assert len(found) > 80


@given(address=st.ip_addresses())
def test_the_policy_is_never_more_open_than_the_gateway(
    address: IPv4Address | IPv6Address, render: Callable
) -> None:
    assert gateway_fetches_from(render("base"), address) <= is_public(address)
