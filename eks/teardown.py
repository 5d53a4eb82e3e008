"""Delete the cluster and everything that belongs to it, then prove it: `python -m eks.teardown`."""

import argparse
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from eks.account import Cluster, Problem, connect, reported
from eks.services import delete_services

GRACE_SECONDS = 120  # until AWS's list of tags should have forgotten what is gone


class Teardown:
    """Finds the parts of a cluster and its repositories, and deletes them.

    Whatever lacks the project's tag belongs to somebody else, and stays.
    """

    def __init__(
        self, cluster: Cluster, aws: Callable[[str], Any], poll: float, timeout: float, eksctl: bool
    ) -> None:
        self.cluster, self.aws, self.poll, self.timeout = cluster, aws, poll, timeout
        self.eksctl = eksctl

    def listed(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        """Return everything that an operation lists under a key, from all pages."""
        pages = self.aws(service).get_paginator(operation).paginate(**arguments)
        return [item for page in pages for item in page[key]]

    def wait(self, left: Callable[[], list[str]], what: str, seconds: float) -> list[str]:
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

    def wait_or_fail(self, left: Callable[[], list[str]], what: str) -> None:
        """Poll until nothing is left; raise Problem when that takes too long."""
        if names := self.wait(left, what, self.timeout):
            raise Problem(
                f"After {self.timeout:.0f} seconds there is still {', '.join(names)}: "
                "run this again to go on waiting."
            )

    def find(self) -> dict[str, Any] | None:
        """Return what EKS says about the cluster of this name, whoever owns it."""
        eks = self.aws("eks")
        try:
            return eks.describe_cluster(name=self.cluster.name)["cluster"]
        except eks.exceptions.ResourceNotFoundException:
            return None

    def describe(self) -> dict[str, Any] | None:
        """Return what EKS says about our cluster; None if there is none, or it is not ours."""
        found = self.find()
        return found if found and self.cluster.owns(found.get("tags", {})) else None

    def load_balancers(self) -> dict[str, Callable[[], Any]]:
        """Return our load balancers by name or ARN, and how to delete each."""
        found: dict[str, Callable[[], Any]] = {}
        of_cluster = f"kubernetes.io/cluster/{self.cluster.name}" if self.describe() else None
        for service, key, argument, names, group in (
            ("elbv2", "LoadBalancers", "LoadBalancerArn", "ResourceArns", "ResourceArn"),
            ("elb", "LoadBalancerDescriptions", "LoadBalancerName", "LoadBalancerNames", None),
        ):
            client = self.aws(service)
            every = [
                each[argument] for each in self.listed(service, "describe_load_balancers", key)
            ]
            for start in range(0, len(every), 20):  # no more at a time
                answer = client.describe_tags(**{names: every[start : start + 20]})
                for each in answer["TagDescriptions"]:
                    tags = {tag["Key"]: tag.get("Value", "") for tag in each["Tags"]}
                    if self.cluster.owns(tags) or of_cluster in tags:
                        name = each[group or argument]
                        found[name] = partial(client.delete_load_balancer, **{argument: name})
        return found

    def node_groups(self) -> list[str]:
        """Return the names of the cluster's node groups."""
        if not self.describe():
            return []
        return self.listed("eks", "list_nodegroups", "nodegroups", clusterName=self.cluster.name)

    def stacks(self) -> list[str]:
        """Return eksctl's CloudFormation stacks; the one of network and cluster comes last."""
        stacks = []
        for stack in self.listed("cloudformation", "describe_stacks", "Stacks"):
            tags = {tag["Key"]: tag["Value"] for tag in stack["Tags"]}
            cluster = tags.get("alpha.eksctl.io/cluster-name")
            if self.cluster.owns(tags) and cluster == self.cluster.name:
                stacks.append(stack["StackName"])
        return sorted(stacks, key=lambda name: name.endswith("-cluster"))

    def repositories(self) -> dict[str, str]:
        """Return the ARNs of our repositories by name."""
        ours = {}
        for each in self.listed("ecr", "describe_repositories", "repositories"):
            name, arn = each["repositoryName"], each["repositoryArn"]
            if name.startswith(f"{self.cluster.project}/"):
                tags = self.aws("ecr").list_tags_for_resource(resourceArn=arn)["tags"]
                if self.cluster.owns({tag["Key"]: tag["Value"] for tag in tags}):
                    ours[name] = arn
        return ours

    def leftovers(self) -> list[str]:
        """Return everything of ours that exists."""
        name, project = self.cluster.name, self.cluster.project
        # AWS's list by tag still names things for a while after they are gone. So it counts only
        # for services that are not asked directly.
        asked = re.compile(
            rf":(cluster|nodegroup|addon|podidentityassociation)/{name}(/|$)"
            rf"|:repository/{project}/|:loadbalancer/|:stack/eksctl-{name}-"
        )
        service, key = "resourcegroupstaggingapi", "ResourceTagMappingList"
        tag = {"Key": "project", "Values": [project]}
        tagged = self.listed(service, "get_resources", key, TagFilters=[tag])
        left = {each["ResourceARN"] for each in tagged if not asked.search(each["ResourceARN"])}
        terminated = [{"Name": "instance-state-name", "Values": ["terminated"]}]
        for found in self.listed("ec2", "describe_instances", "Reservations", Filters=terminated):
            gone = {each["InstanceId"] for each in found["Instances"]}
            left = {arn for arn in left if arn.rpartition("/")[2] not in gone}
        if cluster := self.describe():
            left.add(cluster["arn"])
        return sorted(
            left.union(self.load_balancers(), self.repositories().values(), self.stacks())
        )

    def delete_load_balancers(self) -> None:
        """Have the cluster delete its load balancers; delete those without a cluster ourselves."""
        if not (found := self.load_balancers()):
            return
        if cluster := self.describe():
            delete_services(cluster, self.cluster.region)
        else:
            for delete in found.values():
                delete()
        self.wait_or_fail(lambda: [*self.load_balancers()], "load balancers")
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

    def delete_stacks(self) -> None:
        """Delete what eksctl created around the cluster and has not deleted itself."""
        cloudformation = self.aws("cloudformation")
        waiter = cloudformation.get_waiter("stack_delete_complete")
        for stack in self.stacks():
            print(f"deleting the stack {stack}")
            cloudformation.delete_stack(StackName=stack)
            attempts = max(1, round(self.timeout / self.poll))
            config = {"Delay": self.poll, "MaxAttempts": attempts}
            waiter.wait(StackName=stack, WaiterConfig=config)

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
        left = work.leftovers()
        print(*(f"would delete {name}" for name in left), f"{len(left)} in all", sep="\n")
        return 0
    if work.find() and not work.describe():
        print(f"the cluster {cluster.name} is not ours, it has no tag project={cluster.project}")
    work.delete_load_balancers()
    work.delete_cluster()
    work.delete_load_balancers()  # created in the meantime
    work.delete_stacks()
    work.delete_repositories()
    left = work.wait(work.leftovers, "AWS to forget them", min(GRACE_SECONDS, args.timeout))
    print(*left, f"{len(left)} left with the tag project={cluster.project}", sep="\n")
    if left:
        print("Run this again in some minutes; delete by hand what is listed then.")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(reported(main))
