"""The cluster that eks/cluster.yaml describes, the AWS account, and sentences for its errors."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ROOT = Path(__file__).resolve().parent.parent
PATIENT = Config(retries={"mode": "standard", "max_attempts": 4}, connect_timeout=10)

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
UNKNOWN = {
    *("InvalidClientTokenId", "UnrecognizedClientException", "AuthFailure"),
    *("SignatureDoesNotMatch", "InvalidSignatureException", "InvalidAccessKeyId"),
}
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
QUOTA = {
    *("LimitExceededException", "LimitExceeded", "ResourceLimitExceededException"),
    *("ServiceQuotaExceededException", "TooManyRequestsException"),
}


class Problem(Exception):
    """What went wrong and what to do, in sentences for the user."""


@dataclass(frozen=True)
class Cluster:
    """What the programs need to know of eks/cluster.yaml."""

    name: str
    region: str
    version: str
    tags: dict[str, str]
    node_groups: list[dict[str, Any]]
    nat_gateway: str

    @classmethod
    def read(cls, path: Path = ROOT / "eks/cluster.yaml") -> "Cluster":
        """Read the file."""
        config = yaml.safe_load(path.read_text())
        about = config["metadata"]
        nat = config["vpc"]["nat"]["gateway"]
        groups = config["managedNodeGroups"]
        return cls(about["name"], about["region"], about["version"], about["tags"], groups, nat)

    @property
    def project(self) -> str:
        """The value of the tag ``project``, which also begins every repository's name."""
        return self.tags["project"]

    def owns(self, tags: dict[str, str]) -> bool:
        """Whether something with these tags was made for this project."""
        return tags.get("project") == self.project


def connect(cluster: Cluster, account: str | None = None) -> Callable[[str], Any]:
    """Check account and region, print them, and return a function that makes a service's client.

    Raises:
        Problem: AWS rejects the credentials, they belong to another account than `account`, or the
            configuration names another region than eks/cluster.yaml.
    """
    # aws and eksctl obey AWS_REGION first; boto3 does not know it.
    configured = os.environ.get("AWS_REGION") or boto3.Session().region_name
    if configured not in (None, cluster.region):
        raise Problem(
            f"Your AWS configuration says {configured} and eks/cluster.yaml says {cluster.region}: "
            f"set AWS_REGION={cluster.region}, or change the file."
        )
    session: Any = boto3.Session(region_name=cluster.region)
    client = cache(partial(session.client, config=PATIENT))
    try:
        identity = client("sts").get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        raise Problem(explain(error)) from error
    if account not in (None, identity["Account"]):
        raise Problem(
            f"These are credentials of account {identity['Account']}, not of {account}: "
            "choose another profile with AWS_PROFILE."
        )
    who = f"{identity['Account']}, {cluster.region}, as {identity['Arn'].split('/')[-1]}"
    print(f"account {who}{', simulated on this machine' * simulated(client)}")
    return client


def simulated(aws: Callable[[str], Any]) -> bool:
    """Say whether the account is simulated on this machine (AWS_ENDPOINT_URL)."""
    return urlsplit(aws("sts").meta.endpoint_url).hostname in ("127.0.0.1", "localhost")


def explain(error: BotoCoreError | ClientError) -> str:
    """Explain an error of AWS or of its library in sentences."""
    if isinstance(error, BotoCoreError):
        return CAUSES.get(type(error).__name__, "AWS could not be asked: {}").format(error)
    code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
    if code in EXPIRED:
        return "Your AWS credentials have expired: log in again, then run this again."
    if code in UNKNOWN:
        return "AWS does not know these credentials: check AWS_PROFILE, or the keys themselves."
    if code in DENIED:
        return f"AWS denies {error.operation_name}: {message} Have an administrator allow it."
    if code in QUOTA:
        return (
            f"A quota of the account is used up, says AWS to {error.operation_name}: {message} "
            "Delete what you do not need, or ask for more under Service Quotas."
        )
    return f"AWS answers {error.operation_name} with {code}: {message}"


def reported(main: Callable[[], int]) -> int:
    """Run a program, print what goes wrong as a sentence, and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # also into a pipe, such as a notebook's
    try:
        return main()
    except Problem as problem:
        sentence = str(problem)
    except (BotoCoreError, ClientError) as error:
        sentence = explain(error)
    except KeyboardInterrupt:
        print("Interrupted. Run it again to go on where it stopped.", file=sys.stderr)
        return 130
    print(sentence, file=sys.stderr)
    return 1


CAUSES = {
    "NoCredentialsError": "There are no AWS credentials here: log in with the aws command, or set "
    "AWS_PROFILE.",
    "PartialCredentialsError": "Your AWS credentials are incomplete: {}",
    "ProfileNotFound": "{}: AWS_PROFILE names it.",
    "EndpointConnectionError": "AWS cannot be reached, or has no such region: {}",
    "WaiterError": "{} Run this again to go on waiting.",
} | dict.fromkeys(
    ("TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"),
    "Your AWS login has expired: log in again, then run this again.",
)
