"""What an AWS account holds of the cluster of eks/cluster.yaml, and what bears its name."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from eks.account import Cluster

STACK, OF_EKSCTL = "aws:cloudformation:stack-name", "alpha.eksctl.io/cluster-name"  # tags
OF_KUBERNETES, OF_NETWORK = "kubernetes.io/cluster/", "cluster.k8s.amazonaws.com/name"


class Kind(NamedTuple):
    """Something that balances load: who lists it under which keys, and who knows its tags."""

    service: str
    noun: str
    listed: str
    argument: str
    asked: str
    answered: str


BALANCERS = (
    Kind(
        *("elbv2", "load_balancer", "LoadBalancers", "LoadBalancerArn"),
        *("ResourceArns", "ResourceArn"),
    ),
    Kind(
        *("elb", "load_balancer", "LoadBalancerDescriptions", "LoadBalancerName"),
        *("LoadBalancerNames", "LoadBalancerName"),
    ),
)
TARGETS = (
    Kind(
        *("elbv2", "target_group", "TargetGroups", "TargetGroupArn"),
        *("ResourceArns", "ResourceArn"),
    ),
)
STRAYS = {  # what EC2 deletes by its id: operation and argument
    "instance": ("terminate_instances", "InstanceIds"),
    "network-interface": ("delete_network_interface", "NetworkInterfaceId"),
    "volume": ("delete_volume", "VolumeId"),
    "security-group": ("delete_security_group", "GroupId"),
    "launch-template": ("delete_launch_template", "LaunchTemplateId"),
}


class Inventory:
    """Finds the parts of a cluster and its repositories.

    Whatever lacks the project's tag belongs to somebody else.
    """

    def __init__(self, cluster: Cluster, aws: Callable[[str], Any]) -> None:
        self.cluster, self.aws = cluster, aws
        self.label = f"{OF_KUBERNETES}{cluster.name}"
        self.gone: set[str] = set()

    def listed(self, service: str, operation: str, key: str, **arguments: Any) -> list[Any]:
        """Return everything that an operation lists under a key, from all pages."""
        pages = self.aws(service).get_paginator(operation).paginate(**arguments)
        return [item for page in pages for item in page[key]]

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

    def balancing(
        self, kinds: tuple[Kind, ...]
    ) -> Iterator[tuple[str, dict[str, str], Callable[[], Any]]]:
        """Yield load balancers or target groups: name or ARN, tags, and how to delete each."""
        for kind in kinds:
            client = self.aws(kind.service)
            delete = getattr(client, f"delete_{kind.noun}")
            found = self.listed(kind.service, f"describe_{kind.noun}s", kind.listed)
            every = [each[kind.argument] for each in found]
            for start in range(0, len(every), 20):  # no more at a time
                answer = client.describe_tags(**{kind.asked: every[start : start + 20]})
                for each in answer["TagDescriptions"]:
                    name = each[kind.answered]
                    yield name, as_dict(each["Tags"]), partial(delete, **{kind.argument: name})

    def ours(self, kinds: tuple[Kind, ...]) -> dict[str, Callable[[], Any]]:
        """Return our load balancers or target groups by name or ARN, and how to delete each."""
        label = self.label if self.describe() else None
        return {
            name: delete
            for name, tags, delete in self.balancing(kinds)
            if self.cluster.owns(tags) or label in tags
        }

    def node_groups(self) -> list[str]:
        """Return the names of the cluster's node groups."""
        if not self.describe():
            return []
        return self.listed("eks", "list_nodegroups", "nodegroups", clusterName=self.cluster.name)

    def stacks(self) -> list[str]:
        """Return eksctl's CloudFormation stacks; the one of network and cluster comes last."""
        stacks = []
        for stack in self.listed("cloudformation", "describe_stacks", "Stacks"):
            tags = as_dict(stack["Tags"])
            if self.cluster.owns(tags) and tags.get(OF_EKSCTL) == self.cluster.name:
                stacks.append(stack["StackName"])
        return sorted(stacks, key=lambda name: name.endswith("-cluster"))

    def repositories(self) -> dict[str, str]:
        """Return the ARNs of our repositories by name."""
        ours = {}
        for each in self.listed("ecr", "describe_repositories", "repositories"):
            name, arn = each["repositoryName"], each["repositoryArn"]
            if name.startswith(f"{self.cluster.project}/"):
                tags = self.aws("ecr").list_tags_for_resource(resourceArn=arn)["tags"]
                if self.cluster.owns(as_dict(tags)):
                    ours[name] = arn
        return ours

    def others(self) -> dict[str, dict[str, str]]:
        """Return the tags of everything of ours that no other method here finds, by ARN."""
        name, project = self.cluster.name, self.cluster.project
        # AWS's list by tag still names things for a while after they are gone. So it counts only
        # for services that are not asked directly.
        asked = re.compile(
            rf":(cluster|nodegroup|addon|podidentityassociation)/{name}(/|$)"
            rf"|:repository/{project}/|:(loadbalancer|targetgroup)/|:stack/eksctl-{name}-"
        )
        service, key = "resourcegroupstaggingapi", "ResourceTagMappingList"
        tag = {"Key": "project", "Values": [project]}
        found = self.listed(service, "get_resources", key, TagFilters=[tag])
        gone = set(self.gone)
        terminated = [{"Name": "instance-state-name", "Values": ["terminated"]}]
        for each in self.listed("ec2", "describe_instances", "Reservations", Filters=terminated):
            gone |= {instance["InstanceId"] for instance in each["Instances"]}
        return {
            each["ResourceARN"]: as_dict(each["Tags"])
            for each in found
            if not asked.search(each["ResourceARN"])
            and each["ResourceARN"].rpartition("/")[2] not in gone
        }

    def strays(self) -> dict[str, Callable[[], Any]]:
        """Return, by ARN, how to delete what has our tag and no stack, or none any more.

        That leaves out whatever says that it is part of another cluster, or of another stack.
        """
        strays: dict[str, Callable[[], Any]] = {}
        stacks = self.stacks()
        for arn, tags in self.others().items():
            service, _, _, thing = arn.split(":", 5)[2:]
            kind, _, identity = thing.partition("/")
            clusters = {key for key in tags if key.startswith(OF_KUBERNETES)}
            foreign = bool(clusters) and self.label not in clusters
            if STACK in tags or OF_EKSCTL in tags:
                foreign |= tags.get(OF_EKSCTL) != self.cluster.name
            known = service == "ec2" and kind in STRAYS
            if known and not foreign and tags.get(STACK) not in stacks:
                operation, argument = STRAYS[kind]
                value = [identity] if argument.endswith("s") else identity
                strays[arn] = partial(getattr(self.aws("ec2"), operation), **{argument: value})
        return strays

    def leftovers(self) -> dict[str, bool]:
        """Return everything of ours that exists, and whether we know how to delete it."""
        strays, stacks, others = self.strays(), self.stacks(), self.others()
        left = {arn: arn in strays or tags.get(STACK) in stacks for arn, tags in others.items()}
        asked = [*self.ours(BALANCERS), *self.ours(TARGETS), *self.repositories().values(), *stacks]
        if cluster := self.describe():
            asked.append(cluster["arn"])
        return dict(sorted((left | dict.fromkeys(asked, True)).items()))

    def unclaimed(self) -> list[str]:
        """Return what bears the cluster's name, lacks our tag, and is not deleted with the cluster.

        Log groups, and volumes that pods have asked for. When the cluster is gone, also what it
        should have taken with it.
        """
        found, kinds = [], [("volume", "Volumes", "VolumeId", "Tags")]
        if cluster := self.find():
            if not self.cluster.owns(cluster.get("tags", {})):
                return []
        else:
            kinds.append(("network_interface", "NetworkInterfaces", "NetworkInterfaceId", "TagSet"))
            kinds.append(("security_group", "SecurityGroups", "GroupId", "Tags"))
            for name, tags, _ in self.balancing(BALANCERS + TARGETS):
                if self.label in tags and not self.cluster.owns(tags):
                    found.append(name)
        filters = [{"Name": "tag-key", "Values": [self.label, OF_NETWORK]}]
        for noun, key, identity, tagged in kinds:
            for each in self.listed("ec2", f"describe_{noun}s", key, Filters=filters):
                tags = as_dict(each[tagged])
                named = self.label in tags or tags.get(OF_NETWORK) == self.cluster.name
                if named and not self.cluster.owns(tags):
                    found.append(each[identity])
        for service in ("eks", "containerinsights"):
            prefix = f"/aws/{service}/{self.cluster.name}/"
            groups = self.listed(
                "logs", "describe_log_groups", "logGroups", logGroupNamePrefix=prefix
            )
            found += [f"log group {each['logGroupName']}" for each in groups]
        return sorted(found)


def as_dict(tags: list[dict[str, str]]) -> dict[str, str]:
    """Return tags by their keys."""
    return {tag["Key"]: tag.get("Value", "") for tag in tags}
