"""Publish the images to ECR and write the overlay that runs them: ``python -m eks.publish``.

They are those that the manifests name. With ``APP=leaf``, as for Compose, leaf-gateway and
leaf-model take their places; a model is called as its image is.
"""

import argparse
import ipaddress
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from eks.account import ROOT, Cluster, Problem, connect, reported
from eks.images import inspect, logged_in, push
from eks.services import find_kubectl

SERVICE = "gateway"
LIFECYCLE = {
    "rules": [
        {
            "rulePriority": 1,
            "description": "Keep the ten newest images",
            "selection": {
                "tagStatus": "any",
                "countType": "imageCountMoreThan",
                "countNumber": 10,
            },
            "action": {"type": "expire"},
        }
    ]
}
MANIFESTS = [
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
]


class Image:
    """A local image, such as clothing-model:001, and its places: a registry, and a container."""

    def __init__(self, reference: str, cluster: Cluster):
        self.reference = reference
        self.name, _, self.tag = reference.partition(":")
        if not self.tag:
            raise Problem(f"{reference} has no tag: write {reference}:001, for example.")
        self.repository = f"{cluster.project}/{self.name}"
        self.container: dict[str, Any] = {}
        self.address = ""
        self.id: str | None = None
        self.digest: str | None = None


def containers(base: Path) -> dict[str, dict[str, Any]]:
    """Return the containers that kustomize makes of a folder, by their images."""
    kubectl = find_kubectl()
    if not kubectl:
        raise Problem("Reading the manifests takes kubectl: install it.")
    done = subprocess.run([kubectl, "kustomize", base], capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"kubectl cannot build {base}: {done.stderr.strip()}")
    objects = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "Deployment"]
    found = [each["spec"]["template"]["spec"]["containers"][0] for each in objects]
    return {each["image"]: each for each in found}


def role(reference: str) -> str:
    """Return the last word of an image's name: gateway or model."""
    return reference.partition(":")[0].rpartition("-")[2]


def own_image(reference: str) -> str:
    """Return what stands for an image of the manifests: the same one, or that of APP."""
    app = os.environ.get("APP")
    return f"{app}-{role(reference)}:{reference.partition(':')[2]}" if app else reference


def place(images: list[Image], named: dict[str, dict[str, Any]]) -> None:
    """Give each image the container that runs it; raise Problem unless they fit one to one."""
    roles = {role(reference): container for reference, container in named.items()}
    if sorted(role(image.reference) for image in images) != sorted(roles):
        raise Problem(
            f"The manifests name {' and '.join(named)}: give one image for each, whose name ends"
            f" in {' and '.join(f'-{each}' for each in roles)}, or none."
        )
    for image in images:
        image.container = roles[role(image.reference)]


def rename_probe(image: Image) -> list[dict[str, str]]:
    """Return the change, if any, after which the readiness probe asks for the image's model."""
    path = image.container["readinessProbe"]["httpGet"]["path"]
    wanted = re.sub("^(/v1/models/)[^/]+", rf"\g<1>{image.name}", path)
    field = "/spec/template/spec/containers/0/readinessProbe/httpGet/path"
    return [{"op": "replace", "path": field, "value": wanted}] if wanted != path else []


def ensure_repository(ecr: Any, cluster: Cluster, name: str, dry_run: bool) -> str:
    """Create a repository, or check that an existing one is ours and has the right settings.

    Returns:
        Its address, without a tag; empty when a dry run finds none.

    Raises:
        Problem: the repository belongs to somebody else, or has other settings.
    """
    wanted = {
        "imageTagMutability": "IMMUTABLE",
        "imageScanningConfiguration": {"scanOnPush": True},
    }
    try:
        (found,) = ecr.describe_repositories(repositoryNames=[name])["repositories"]
    except ecr.exceptions.RepositoryNotFoundException:
        if dry_run:
            print(f"would create the repository {name}")
            return ""
        ours = [{"Key": key, "Value": value} for key, value in cluster.tags.items()]
        found = ecr.create_repository(repositoryName=name, tags=ours, **wanted)["repository"]
        print(f"repository {name} made")
    arn = found["repositoryArn"]
    tags = {tag["Key"]: tag["Value"] for tag in ecr.list_tags_for_resource(resourceArn=arn)["tags"]}
    if not cluster.owns(tags):
        raise Problem(
            f"The repository {name} exists and is not ours, it has no tag project="
            f"{cluster.project}: give ours another name in metadata.tags of eks/cluster.yaml."
        )
    other = [
        f"{key} is {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]
    ]
    try:
        text = ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"]
        if json.loads(text) != LIFECYCLE:
            other.append("its lifecycle rule is another one")
    except ecr.exceptions.LifecyclePolicyNotFoundException:
        # A new repository, or one whose creation was interrupted.
        if not other and not dry_run:
            ecr.put_lifecycle_policy(repositoryName=name, lifecyclePolicyText=json.dumps(LIFECYCLE))
    if other:
        raise Problem(
            f"The repository {name} exists with other settings ({'; '.join(other)}): change them "
            "back, or delete it."
        )
    return found["repositoryUri"]


def published(ecr: Any, image: Image) -> str | None:
    """Return the digest that the image's tag has in the repository, or None if it has no such tag.

    Raises:
        Problem: the tag belongs to another image than the local one, and tags are immutable.
    """
    answer = ecr.batch_get_image(
        repositoryName=image.repository,
        imageIds=[{"imageTag": image.tag}],
        acceptedMediaTypes=MANIFESTS,
    )
    for found in answer["images"]:
        digest = found["imageId"]["imageDigest"]
        configuration = json.loads(found["imageManifest"]).get("config", {}).get("digest")
        # Engines name an image by its configuration or, with the containerd store, its manifest.
        if image.id in (None, digest, configuration):
            return digest
        raise Problem(
            f"{image.repository} has another image under the tag {image.tag} already, and tags are "
            "immutable: build yours under a new one."
        )
    return None


def write_overlay(folder: Path, base: Path, images: list[Image], allowed: list[str]) -> None:
    """Write the overlay with the images' names in one account to a folder that git ignores.

    Args:
        folder: where its kustomization.yaml goes.
        base: the folder that the overlay is over.
        images: named by their digest, or by their tag if there is no digest.
        allowed: the networks that may use the load balancer; it stays closed if there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overlay: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(base, folder.resolve())],
        "images": [
            {"name": image.container["image"].partition(":")[0], "newName": image.address}
            | ({"digest": image.digest} if image.digest else {"newTag": image.tag})
            for image in images
        ],
    }
    patches: list[tuple[str, str, list[Any]]] = [
        ("Deployment", image.container["name"], rename_probe(image)) for image in images
    ]
    if allowed:
        change = {"op": "replace", "path": "/spec/loadBalancerSourceRanges", "value": allowed}
        patches.append(("Service", SERVICE, [change]))
    overlay["patches"] = [
        {"target": {"kind": kind, "name": name}, "patch": json.dumps(changes)}
        for kind, name, changes in patches
        if changes
    ]
    draft = folder / "kustomization.draft"
    draft.write_text(yaml.safe_dump(overlay, sort_keys=False))
    draft.replace(folder / "kustomization.yaml")
    print(f"overlay written: kubectl apply -k {os.path.relpath(folder, ROOT)}")
    everybody = "0.0.0.0/0" in allowed
    admitted = "everybody" if everybody else ", ".join(allowed) or "nobody: give --allow"
    print(f"the load balancer will admit {admitted}")


def main() -> int:
    """Create repositories, push images, write the overlay."""
    parser = argparse.ArgumentParser(prog="python -m eks.publish", description=__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE:TAG", help="default: those that the manifests name")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="CIDR",
        type=ipaddress.IPv4Network,
        help="who may use the load balancer, for example 203.0.113.7/32; without: nobody",
    )
    add("--gpu", action="store_true", help="let the model server run on the GPU nodes")
    add("--account", help="refuse to work in any other account")
    add("--registry", metavar="HOST:PORT", help="push to a registry here instead of ECR's")
    add("--no-push", action="store_true", help="only make the repositories and the overlay")
    add("--overlay", type=Path, default=ROOT / "build/eks", metavar="FOLDER", help="%(default)s")
    add("--dry-run", action="store_true", help="look, and say what would be done")
    args = parser.parse_args()

    if args.registry and not args.registry.startswith(("127.0.0.1:", "localhost:")):
        raise Problem("--registry is for rehearsals on this machine: 127.0.0.1:PORT.")
    cluster = Cluster.read()
    base = ROOT / "eks/gpu" if args.gpu else ROOT / "eks"
    named = containers(base)
    references = args.images or [own_image(reference) for reference in named]
    images = [Image(reference, cluster) for reference in references]
    place(images, named)
    if not args.no_push:
        for image in images:
            image.id = inspect(image.reference, cluster)
    ecr = connect(cluster, args.account)("ecr")
    for image in images:
        image.address = ensure_repository(ecr, cluster, image.repository, args.dry_run)
        image.digest = published(ecr, image) if image.address else None
        if args.registry:
            image.address = f"{args.registry}/{image.repository}"
    missing = [] if args.no_push else [image for image in images if not image.digest]
    if args.dry_run:
        for image in missing:
            print(f"would push {image.reference}")
        print("would write the overlay")
        return 0
    if missing:
        (given,) = ecr.get_authorization_token()["authorizationData"]
        registry = missing[0].address.partition("/")[0]
        with logged_in(registry, given["authorizationToken"]) as env:
            for image in missing:
                image.digest = push(image.reference, f"{image.address}:{image.tag}", env)
    for image in images:
        print(f"{image.reference} {image.digest or 'is not in the registry yet'}")
    write_overlay(args.overlay, base, images, [str(network) for network in args.allow])
    return 0


if __name__ == "__main__":
    raise SystemExit(reported(main))
