"""What the cluster of eks/cluster.yaml costs: ``python -m eks.cost``."""

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from eks.account import Cluster, Problem, reported

# Dollars an hour on demand; for disks, a gigabyte and month. These are the prices of us-west-2.
# Prices change, and differ between regions: AWS's price list has yours.
PRICES = {
    "control plane": 0.10,
    "t3.large": 0.0832,
    "g4dn.xlarge": 0.526,
    "disk": 0.08,
    "public address": 0.005,
    "load balancer": 0.0225,
    "NAT gateway": 0.045,
}
HOURS_A_MONTH = 730
ZONES = 3  # eksctl uses three, and a load balancer has an address in each


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
    counts = {name: group["desiredCapacity"] for name, group in groups.items()} | dict(nodes or {})
    if unknown := set(counts) - set(groups):
        raise Problem(f"eks/cluster.yaml has no node group {', '.join(unknown)}.")
    types = {group["instanceType"] for group in groups.values()}
    if unknown := types - set(prices):
        raise Problem(f"There is no price of {', '.join(unknown)}: give one with --price.")
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


def pairs(text: str) -> tuple[str, float]:
    """Read ``NAME=NUMBER``."""
    name, _, number = text.partition("=")
    return name, float(number)


def main() -> int:
    """Print the costs."""
    parser = argparse.ArgumentParser(prog="python -m eks.cost", description=__doc__)
    add: Any = {"type": pairs, "action": "append", "default": []}
    parser.add_argument("--price", metavar="NAME=DOLLARS", help="a price of yours", **add)
    parser.add_argument("--nodes", metavar="GROUP=N", help="for example gpu=1", **add)
    args = parser.parse_args()
    nodes = {name: int(count) for name, count in args.nodes}
    Console().print(table(hourly_costs(Cluster.read(), PRICES | dict(args.price), nodes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(reported(main))
