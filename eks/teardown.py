"""Delete the cluster and all that belongs to it, and prove it: ``python -m eks.teardown``."""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from botocore.exceptions import ClientError, WaiterError
from rich.console import Console

from eks.account import Cluster, Problem, connect, explain, reported
from eks.inventory import BALANCERS, TARGETS, Inventory
from eks.services import delete_services

GRACE_SECONDS = 120  # until AWS's list of tags should have forgotten what is gone


class Teardown(Inventory):
    """Deletes what the inventory finds.

    Whatever lacks the project's tag belongs to somebody else, and stays.
    """

    def __init__(
        self, cluster: Cluster, aws: Callable[[str], Any], poll: float, timeout: float, eksctl: bool
    ) -> None:
        super().__init__(cluster, aws)
        self.poll, self.timeout, self.eksctl = poll, timeout, eksctl
        self.ending: set[str] = set()  # instances, which take a while
        self.refused: dict[str, str] = {}

    def wait(
        self, left: Callable[[], Collection[str]], what: str, seconds: float
    ) -> Collection[str]:
        """Poll until nothing is left, and return what is still there when time is up."""
        deadline = time.monotonic() + seconds
        if names := left():
            print(f"waiting for {what}: {', '.join(names)}")
        with Console().status("") as status:
            while (names := left()) and time.monotonic() < deadline:
                rest = round(deadline - time.monotonic())
                status.update(f"{rest} s at most: {', '.join(names)}")
                time.sleep(self.poll)
        return names

    def wait_or_fail(self, left: Callable[[], Collection[str]], what: str) -> None:
        """Poll until nothing is left; raise Problem when that takes too long."""
        if names := self.wait(left, what, self.timeout):
            raise Problem(
                f"After {self.timeout:.0f} seconds there is still {', '.join(names)}: "
                "run this again to go on waiting."
            )

    def delete_load_balancers(self) -> None:
        """Have the cluster delete its load balancers; delete those without a cluster ourselves."""
        if not (found := self.ours(BALANCERS)):
            return
        if cluster := self.describe():
            delete_services(cluster, self.cluster.region)
        else:
            for delete in found.values():
                delete()
        self.wait_or_fail(lambda: self.ours(BALANCERS), "load balancers")
        print("load balancers gone")

    def delete_cluster(self) -> None:
        """Delete node groups and cluster, with eksctl where it is installed."""
        eks, name = self.aws("eks"), self.cluster.name
        if not self.describe():
            return
        if self.eksctl and shutil.which("eksctl"):
            options = [f"--region={self.cluster.region}", "--wait", "--disable-nodegroup-eviction"]
            command = ["eksctl", "delete", "cluster", f"--name={name}", *options]
            if subprocess.run(command).returncode:
                raise Problem("eksctl failed, see above: mend that and run this again.")
        for group in self.node_groups():
            about = eks.describe_nodegroup(clusterName=name, nodegroupName=group)["nodegroup"]
            if about["status"] != "DELETING":
                eks.delete_nodegroup(clusterName=name, nodegroupName=group)
        self.wait_or_fail(self.node_groups, "node groups")
        if (cluster := self.describe()) and cluster["status"] != "DELETING":
            eks.delete_cluster(name=name)
        self.wait_or_fail(lambda: [name] if self.describe() else [], "the cluster")
        print(f"cluster {name} gone")

    def delete_target_groups(self) -> None:
        """Delete what load balancers have left behind."""

        def in_use() -> Collection[str]:
            for name, delete in self.ours(TARGETS).items():
                with suppress(self.aws("elbv2").exceptions.ResourceInUseException):
                    delete()
                    print(f"{name} deleted")
            return self.ours(TARGETS)

        self.wait_or_fail(in_use, "target groups")

    def delete_strays(self) -> Collection[str]:
        """Try to delete what has the tag and no stack, and return what is still there."""
        for arn, delete in self.strays().items():
            identity = arn.rpartition("/")[2]
            if identity in self.ending:
                continue
            try:
                delete()
                print(f"{arn} deleted")
            except ClientError as error:
                if "NotFound" not in error.response["Error"]["Code"]:
                    self.refused[arn] = explain(error)
                    continue
            (self.ending if identity.startswith("i-") else self.gone).add(identity)
        return self.strays()

    def delete_stacks(self) -> None:
        """Delete what eksctl created around the cluster and has not deleted itself."""
        cloudformation = self.aws("cloudformation")
        waiter = cloudformation.get_waiter("stack_delete_complete")
        for stack in self.stacks():
            print(f"deleting the stack {stack}")
            cloudformation.delete_stack(StackName=stack)
            attempts = max(1, round(self.timeout / self.poll))
            config = {"Delay": self.poll, "MaxAttempts": attempts}
            try:
                waiter.wait(StackName=stack, WaiterConfig=config)
            except WaiterError as error:
                raise Problem(
                    f"{explain(error)} The cause may be what bears the cluster's name: "
                    f"{', '.join(self.unclaimed()) or 'nothing that is known'}."
                ) from error

    def delete_repositories(self) -> None:
        """Delete our repositories with their images."""
        for name in self.repositories():
            self.aws("ecr").delete_repository(repositoryName=name, force=True)
            print(f"repository {name} deleted")


def main() -> int:
    """Delete, wait, and list what is left."""
    parser = argparse.ArgumentParser(prog="python -m eks.teardown", description=__doc__)
    add = parser.add_argument
    add("--account", help="refuse to work in any other account")
    add("--dry-run", action="store_true", help="look, and list what would be deleted")
    add("--no-eksctl", action="store_true", help="do without eksctl, even if it is installed")
    add("--poll", type=float, default=10, metavar="SECONDS", help="how often to look")
    add("--timeout", type=float, default=1200, metavar="SECONDS", help="how long to wait for each")
    args = parser.parse_args()

    cluster = Cluster.read()
    aws = connect(cluster, args.account)
    work = Teardown(cluster, aws, args.poll, args.timeout, eksctl=not args.no_eksctl)
    if args.dry_run:
        for name, known in (found := work.leftovers()).items():
            print(f"would delete {name}" if known else f"would leave {name}: delete it by hand")
        print(f"{len(found)} in all with the tag project={cluster.project}")
        report(cluster, work.unclaimed())
        return 0
    if work.find() and not work.describe():
        print(f"the cluster {cluster.name} is not ours, it has no tag project={cluster.project}")
    work.delete_load_balancers()
    work.delete_cluster()
    work.delete_load_balancers()  # created in the meantime
    work.delete_target_groups()
    grace = min(GRACE_SECONDS, args.timeout)
    work.wait(work.delete_strays, "what is in no stack", grace)
    work.delete_stacks()
    work.delete_repositories()

    def rest() -> Collection[str]:
        work.delete_strays()
        return work.leftovers()

    left = work.wait(rest, "AWS to forget them", grace)
    for name in left:
        print(name, *([work.refused[name]] if name in work.refused else []), sep=": ")
    print(f"{len(left)} left with the tag project={cluster.project}")
    if left:
        print("Run this again in some minutes; delete by hand what is listed then.")
    unclaimed = work.unclaimed()
    report(cluster, unclaimed)
    return 1 if left or unclaimed else 0


def report(cluster: Cluster, unclaimed: list[str]) -> None:
    """Name what is not deleted, because it lacks the tag."""
    for name in unclaimed:
        print(f"without the tag: {name}")
    advice = ": look whether they are yours, and delete them by hand" if unclaimed else ""
    print(f"{len(unclaimed)} things without that tag bear the name {cluster.name}{advice}")


if __name__ == "__main__":
    raise SystemExit(reported(main))
