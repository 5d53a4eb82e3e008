"""What a HorizontalPodAutoscaler of a rehearsal looks at, and what it wants."""

import math
from contextlib import suppress

import psutil

from workbook.manifests import Manifest

SYNC_SECONDS = 15.0  # between two looks, as in a cluster
CALM_SECONDS = 300.0  # after a busy moment until pods go, where no `behavior` says otherwise
TOLERANCE = 0.1


def cpu_seconds(pid: int) -> float:
    """Return the seconds of CPU that a process and its descendants have used; 0 if it is gone."""
    used = 0.0
    with suppress(psutil.Error):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system
    return used


def target_of(spec: Manifest) -> int:
    """Return the CPU that an autoscaler aims at, in per cent of what its pods request."""
    return spec["metrics"][0]["resource"]["target"]["averageUtilization"]


def calm_seconds(spec: Manifest) -> float | None:
    """Return for how long after a busy moment an autoscaler takes no pods away.

    None if its `behavior` asks for anything else, which a rehearsal cannot do.
    """
    behavior = spec.get("behavior", {})
    seconds = behavior.get("scaleDown", {}).get("stabilizationWindowSeconds", CALM_SECONDS)
    alone = {"scaleDown": {"stabilizationWindowSeconds": seconds}}
    return seconds if behavior in ({}, alone) else None


def wish(replicas: int, usage: float, spec: Manifest) -> int:
    """Return how many pods an autoscaler wants, by Kubernetes' formula and within its bounds.

    Args:
        replicas: how many there are.
        usage: their CPU in per cent of what they request, on average.
        spec: the autoscaler's `spec`.
    """
    ratio = usage / target_of(spec)
    wanted = replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(replicas * ratio)
    return min(max(wanted, spec.get("minReplicas", 1)), spec["maxReplicas"])
