"""What the cluster of eks/cluster.yaml costs: ``python -m eks.cost``."""

import argparse
from collections.abc import Mapping
from math import inf
from typing import Any

from rich.console import Console
from rich.table import Table

from eks.account import Cluster, Problem, reported

# Dollars an hour on demand; for disks, a gigabyte and month; for credits, a core and hour. They are
# those of us-west-2. Prices change, and differ between regions: AWS's price list has yours.
PRICES = {
    "control plane": 0.10,
    "t3.large": 0.0832,
    "g4dn.xlarge": 0.526,
    "disk": 0.08,
    "public address": 0.005,
    "load balancer": 0.0225,
    "NAT gateway": 0.045,
    "CPU credit": 0.05,
}
HOURS_A_MONTH = 730
ZONES = 3  # eksctl uses three, and a load balancer has an address in each
# These instances have so many cores, and their price covers this part of each. They may use the
# rest as well, because AWS does not limit their credits unless told to, and then it is billed.
BURSTABLE = {
    f"{family}.{size}": share
    for family in ("t3", "t3a", "t4g")
    for size, share in (("medium", (2, 0.2)), ("large", (2, 0.3)), ("xlarge", (4, 0.4)))
}


def hourly_costs(
    cluster: Cluster, prices: Mapping[str, float] = PRICES, nodes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Work out what a cluster costs while it runs, whether anybody uses it or not.

    Args:
        cluster: the cluster, as eks/cluster.yaml describes it.
        prices: dollars by the names that `PRICES` has, and by instance type.
        nodes: how many nodes a group has, where that is not its ``desiredCapacity``.

    Returns:
        Dollars an hour by item. Traffic, logs and stored images are charged by the gigabyte, and
        are not included.

    Raises:
        Problem: a price is missing, or ``nodes`` names a group that does not exist.
    """
    groups = {group["name"]: group for group in cluster.node_groups}
    counts = node_counts(cluster, nodes)
    types = instance_types(cluster)
    if unknown := types - set(prices):
        raise Problem(f"There is no price of {', '.join(sorted(unknown))}: give one with --price.")
    costs = {"control plane": prices["control plane"]}
    for name, group in groups.items():
        disk = group["volumeSize"] * prices["disk"] / HOURS_A_MONTH
        node = prices[group["instanceType"]] + disk + prices["public address"]
        costs[f"{counts[name]} × {group['instanceType']} ({name})"] = counts[name] * node
    costs["load balancer"] = prices["load balancer"] + ZONES * prices["public address"]
    gateways = {"Disable": 0, "Single": 1, "HighlyAvailable": ZONES}[cluster.nat_gateway]
    if gateways:
        each = prices["NAT gateway"] + prices["public address"]
        costs[f"{gateways} × NAT gateway"] = gateways * each
    return costs


def credit_costs(
    cluster: Cluster, prices: Mapping[str, float] = PRICES, nodes: Mapping[str, int] | None = None
) -> float:
    """Work out what CPU credits cost at most, in dollars an hour: while all cores are busy.

    Args and exceptions are those of `hourly_costs`.
    """
    counts, total = node_counts(cluster, nodes), 0.0
    for group in cluster.node_groups:
        cores, paid = BURSTABLE.get(group["instanceType"], (0, 0.0))
        total += counts[group["name"]] * cores * (1 - paid) * prices["CPU credit"]
    return total


def node_counts(cluster: Cluster, nodes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many nodes each group has; raise Problem where ``nodes`` names no group."""
    counts = {group["name"]: group["desiredCapacity"] for group in cluster.node_groups}
    if unknown := set(nodes or {}) - set(counts):
        raise Problem(f"eks/cluster.yaml has no node group {', '.join(sorted(unknown))}.")
    return counts | dict(nodes or {})


def instance_types(cluster: Cluster) -> set[str]:
    """Return the instance types of a cluster's node groups."""
    return {group["instanceType"] for group in cluster.node_groups}


def table(costs: Mapping[str, float]) -> Table:
    """Lay out costs by the hour and by the day, with their sum."""
    rows = Table("", "$ an hour", "$ a day")
    for column in rows.columns[1:]:
        column.justify = "right"
    for item, cost in costs.items():
        rows.add_row(item, f"{cost:.3f}", f"{24 * cost:.2f}")
    total = sum(costs.values())
    rows.add_section()
    rows.add_row("together", f"{total:.3f}", f"{24 * total:.2f}")
    return rows


def price(text: str) -> tuple[str, float]:
    """Read ``NAME=DOLLARS``; raise ValueError unless they are a number from 0 up."""
    name, _, number = text.partition("=")
    if not 0 <= (dollars := float(number)) < inf:
        raise ValueError(number)
    return name, dollars


def count(text: str) -> tuple[str, int]:
    """Read ``GROUP=N``; raise ValueError unless N is a whole number from 0 up."""
    name, _, number = text.partition("=")
    if (nodes := int(number)) < 0:
        raise ValueError(number)
    return name, nodes


def main() -> int:
    """Print the costs."""
    parser = argparse.ArgumentParser(prog="python -m eks.cost", description=__doc__)
    add: Any = {"action": "append", "default": []}
    parser.add_argument("--price", type=price, metavar="NAME=DOLLARS", help="yours", **add)
    parser.add_argument("--nodes", type=count, metavar="GROUP=N", help="for example gpu=1", **add)
    args = parser.parse_args()
    cluster, prices, nodes = Cluster.read(), PRICES | dict(args.price), dict(args.nodes)
    types = instance_types(cluster)
    if unknown := set(prices) - set(PRICES) - types:
        raise Problem(
            f"Nothing here is called {', '.join(sorted(unknown))}: --price knows "
            f"{', '.join(sorted(types | set(PRICES)))}."
        )
    Console().print(table(hourly_costs(cluster, prices, nodes)))
    if dollars := credit_costs(cluster, prices, nodes):
        names = ", ".join(sorted(types & set(BURSTABLE)))
        print(f"CPU credits of {names}, while all cores are busy: ${dollars:.3f} an hour on top")
    return 0


if __name__ == "__main__":
    raise SystemExit(reported(main))
