"""publish and teardown, run against a simulated AWS account: moto's server, over HTTP."""

import base64
import ctypes
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import pytest
import requests
import yaml
from botocore.loaders import create_loader
from helpers.basics import ROOT, eventually, free_port
from moto.iam.access_control import IAMPolicy, PermissionResult
from moto.server import ThreadedMotoServer
from test_eks import kustomize, named

from eks import publish, teardown
from eks.account import Cluster, reported

PROGRAMS = {"publish": publish.main, "teardown": teardown.main}
CLUSTER = Cluster.read()
ACCOUNT = "123456789012"  # moto's
IMAGES = ["clothing-gateway:001", "clothing-model:001"]
REPOSITORIES = [f"{CLUSTER.project}/{image.partition(':')[0]}" for image in IMAGES]
OURS = [{"Key": "project", "Value": CLUSTER.project}]
OF_CLUSTER = {"Key": f"kubernetes.io/cluster/{CLUSTER.name}", "Value": "owned"}
SECRET = base64.b64encode(f"AWS:{ACCOUNT}-auth-token".encode()).decode()


class Quiet(http.server.BaseHTTPRequestHandler):
    """Handlers that log nothing and answer JSON."""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(handler: type[Quiet], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve on a free port until the test is over."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


class Aws:
    """An account, the programs that work in it, and errors that it can be told to answer."""

    def __init__(self, moto: str, env: dict[str, str], folder: Path):
        self.moto, self.env, self.folder = moto, env, folder
        self.errors: dict[str, tuple[int, str]] = {}
        self.delays: dict[str, float] = {}
        self.replies: dict[str, Any] = {}
        self.asked: list[str] = []
        self.actions: set[str] = set()

    def client(self, name: str) -> Any:
        """A client of moto itself, past the errors."""
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        make: Any = boto3.client
        return make(name, region_name=CLUSTER.region, endpoint_url=self.moto, **keys)

    def command(self, program: str, *arguments: str) -> list[str]:
        if program == "publish":
            arguments = ("--overlay", str(self.folder / "overlay"), *arguments)
        return [f"eks.{program}", *arguments]

    def environment(self, **env: str | None) -> dict[str, str]:
        return {key: value for key, value in {**self.env, **env}.items() if value is not None}

    def start(self, program: str, *arguments: str, **env: str | None) -> subprocess.Popen[str]:
        """Start a program in a process of its own, as a reader does."""
        return subprocess.Popen(
            [sys.executable, "-m", *self.command(program, *arguments)],
            cwd=ROOT,
            text=True,
            env=self.environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, program: str, *arguments: str, status: int = 0, **env: str | None) -> str:
        """Run a program, and return what it prints: its output, or the error it must end with.

        It runs in this process, which has boto3 loaded, with the program's own environment.
        """
        with (
            patch.dict(os.environ, self.environment(**env), clear=True),
            patch.object(sys, "argv", self.command(program, *arguments)),
            patch.object(tempfile, "tempdir", None),  # where TMPDIR says, which is read once
            redirect_stdout(StringIO()) as output,
            redirect_stderr(StringIO()) as error,
        ):
            ended = reported(PROGRAMS[program])
        return self.check(output.getvalue(), error.getvalue(), ended, status)

    def finish(self, process: subprocess.Popen[str], status: int = 0) -> str:
        """Wait for a program that was started, and return what `run` returns."""
        output, error = process.communicate(timeout=240)
        return self.check(output, error, process.returncode, status)

    def check(self, output: str, error: str, ended: int, status: int) -> str:
        print(output, error)
        assert ended == status
        assert "Traceback" not in error and SECRET not in output + error
        assert f"{ACCOUNT}-auth-token" not in output + error
        return output if status == 0 or not error else error

    def repositories(self) -> dict[str, Any]:
        found = self.client("ecr").describe_repositories()["repositories"]
        return {each["repositoryName"]: each for each in found}


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def one_loader() -> Iterator[None]:
    """What botocore knows of AWS's services is read once, not by every session anew."""
    with patch("botocore.session.create_loader", cache(create_loader)):
        yield


@pytest.fixture
def aws(moto: str, tmp_path: Path) -> Iterator[Aws]:
    requests.post(f"{moto}/moto-api/reset", timeout=60).raise_for_status()
    account = Aws(moto, {}, tmp_path)

    class Front(Quiet):
        """Passes on to moto what is not to fail."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            target = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
            form = re.search(rb"Action=(\w+)", body)
            operation = target or (form[1].decode() if form else f"{self.command} {self.path}")
            account.asked.append(operation)
            signed = re.search("/([a-z0-9-]+)/aws4_request", self.headers.get("Authorization", ""))
            account.actions.add(f"{signed[1] if signed else ''}:{operation}")
            time.sleep(account.delays.get(operation, 0))
            if operation in account.replies:
                self.send_response(200)
                data = json.dumps(account.replies[operation]).encode()
            elif operation in account.errors:
                status, code = account.errors[operation]
                self.send_response(status)
                message = f"user/reader at {operation}"
                xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
                plain = json.dumps({"__type": code, "message": message})
                data = (plain if target else f"<ErrorResponse>{xml}</ErrorResponse>").encode()
            else:
                onward = http.client.HTTPConnection(moto.removeprefix("http://"), timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                onward.request(self.command, self.path, body, headers)
                response = onward.getresponse()
                data = response.read()
                self.send_response(response.status)
                for key, value in response.getheaders():
                    if key.lower().startswith(("content-type", "x-amz")):
                        self.send_header(key, value)
                onward.close()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):
                self.wfile.write(data)

        do_GET = do_DELETE = do_PUT = do_POST

    for port in serve(Front):
        account.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }
        yield account


# --- publish -------------------------------------------------------------------------------------


def test_publish_makes_repositories_and_an_overlay_that_renders(aws: Aws) -> None:
    options = ["--no-push", "--allow", "203.0.113.7/32", "--account", ACCOUNT]
    output = aws.finish(aws.start("publish", *options))
    assert "admit 203.0.113.7/32" in output
    ecr = aws.client("ecr")
    found = aws.repositories()
    assert sorted(found) == sorted(REPOSITORIES)
    for name, repository in found.items():
        assert repository["imageTagMutability"] == "IMMUTABLE"
        assert repository["imageScanningConfiguration"] == {"scanOnPush": True}
        assert ecr.list_tags_for_resource(resourceArn=repository["repositoryArn"])["tags"] == OURS
        rule = json.loads(ecr.get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"])
        assert rule["rules"][0]["action"] == {"type": "expire"}
    objects = kustomize(aws.folder / "overlay")
    ranges = named(objects, "Service")["gateway"]["spec"]["loadBalancerSourceRanges"]
    assert ranges == ["203.0.113.7/32"]
    pods = [each["spec"]["template"]["spec"] for each in named(objects, "Deployment").values()]
    images = {pod["containers"][0]["image"] for pod in pods}
    assert images == {f"{found[name]['repositoryUri']}:001" for name in REPOSITORIES}


@pytest.mark.parametrize("options", [[], ["--gpu"]])
def test_images_of_ones_own_take_the_places_of_those_in_the_manifests(
    aws: Aws, options: list[str]
) -> None:
    aws.run("publish", "--no-push", "--allow", "203.0.113.7/32", *options, APP="leaf")
    objects = kustomize(aws.folder / "overlay")
    pods = [each["spec"]["template"]["spec"] for each in named(objects, "Deployment").values()]
    gateway, model = (pod["containers"][0] for pod in pods)
    assert gateway["image"].endswith(f"/{CLUSTER.project}/leaf-gateway:001")
    assert f"/{CLUSTER.project}/leaf-model:001" in model["image"]
    assert model["readinessProbe"]["httpGet"]["path"] == "/v1/models/leaf-model/metadata"
    assert "clothing" not in str([model["startupProbe"], model["livenessProbe"]])
    overlay = (aws.folder / "overlay/kustomization.yaml").read_text()
    tag = "001-gpu" if options else "001"
    aws.run("publish", "--no-push", "leaf-gateway:001", f"leaf-model:{tag}", *options)
    again = (aws.folder / "overlay/kustomization.yaml").read_text()
    assert yaml.safe_load(again)["images"] == yaml.safe_load(overlay)["images"]


@pytest.mark.parametrize(
    "images",
    [["flower:001"], ["leaf-model:001"], [*IMAGES, "leaf-model:001"], ["a-model:1", "b-model:1"]],
)
def test_images_that_fit_nothing_in_the_manifests_are_refused(aws: Aws, images: list[str]) -> None:
    error = aws.run("publish", "--no-push", *images, status=1)
    assert error == (
        "The manifests name clothing-gateway:001 and clothing-model:001: give one image for each,"
        " whose name ends in -gateway and -model, or none.\n"
    )
    assert not aws.asked and not (aws.folder / "overlay").exists()


def test_publish_twice_changes_nothing_more(aws: Aws) -> None:
    aws.run("publish", "--no-push")
    before, overlay = aws.repositories(), (aws.folder / "overlay/kustomization.yaml").read_text()
    aws.asked.clear()
    assert "admit nobody" in aws.run("publish", "--no-push")
    assert aws.repositories() == before
    assert (aws.folder / "overlay/kustomization.yaml").read_text() == overlay
    assert not [name for name in aws.asked if re.match("Create|Put|Tag|Delete", name)]


def test_publish_takes_digests_of_what_is_in_the_registry(aws: Aws) -> None:
    aws.run("publish", "--no-push")
    manifest = {"schemaVersion": 2, "config": {"digest": f"sha256:{'0' * 64}"}, "layers": []}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    answer = aws.client("ecr").put_image(
        repositoryName=REPOSITORIES[0],
        imageManifest=json.dumps({**manifest, "mediaType": kind}),
        imageTag="001",
    )
    digest = answer["image"]["imageId"]["imageDigest"]
    assert digest in aws.run("publish", "--no-push", "--gpu", *IMAGES)
    overlay = yaml.safe_load((aws.folder / "overlay/kustomization.yaml").read_text())
    assert [image.get("digest") for image in overlay["images"]] == [digest, None]
    pod = named(kustomize(aws.folder / "overlay"), "Deployment")["model-server"]["spec"]
    assert pod["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_dry_run_of_publish_makes_nothing(aws: Aws) -> None:
    output = aws.run("publish", "--no-push", "--dry-run")
    assert f"would create the repository {REPOSITORIES[0]}" in output
    assert aws.repositories() == {} and not (aws.folder / "overlay").exists()


def test_an_interrupted_publish_is_finished_by_the_next(aws: Aws) -> None:
    aws.errors["PutLifecyclePolicy"] = (500, "ServerException")
    aws.run("publish", "--no-push", status=1)
    assert list(aws.repositories()) == REPOSITORIES[:1] and not (aws.folder / "overlay").exists()
    aws.errors.clear()
    aws.run("publish", "--no-push")
    for name in REPOSITORIES:
        assert aws.client("ecr").get_lifecycle_policy(repositoryName=name)["lifecyclePolicyText"]


def test_ctrl_c_says_so_and_the_next_run_goes_on(aws: Aws) -> None:
    aws.delays["CreateRepository"] = 20
    process = aws.start("publish", "--no-push")
    eventually(lambda: "CreateRepository" in aws.asked, "CreateRepository", seconds=120)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (
        *(130, "Interrupted. Run it again to go on where it stopped.\n"),
    )
    aws.delays.clear()
    aws.run("publish", "--no-push")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"imageTagMutability": "MUTABLE"}, "imageTagMutability is MUTABLE, not IMMUTABLE"),
        ({"imageScanningConfiguration": {"scanOnPush": False}}, "imageScanningConfiguration is"),
    ],
)
def test_a_repository_with_other_settings_is_named_and_kept(
    aws: Aws, settings: dict[str, Any], sentence: str
) -> None:
    right = {"imageTagMutability": "IMMUTABLE", "imageScanningConfiguration": {"scanOnPush": True}}
    ecr = aws.client("ecr")
    ecr.create_repository(repositoryName=REPOSITORIES[0], tags=OURS, **{**right, **settings})
    before = aws.repositories()
    assert sentence in aws.run("publish", "--no-push", status=1)
    assert aws.repositories() == before
    with pytest.raises(ecr.exceptions.LifecyclePolicyNotFoundException):
        ecr.get_lifecycle_policy(repositoryName=REPOSITORIES[0])


def test_a_repository_with_another_rule_is_named_and_kept(aws: Aws) -> None:
    aws.run("publish", "--no-push")
    ecr = aws.client("ecr")
    rule = {
        **{"rulePriority": 1, "action": {"type": "expire"}},
        "selection": {"tagStatus": "any", "countType": "imageCountMoreThan", "countNumber": 99},
    }
    text = json.dumps({"rules": [rule]})
    ecr.put_lifecycle_policy(repositoryName=REPOSITORIES[0], lifecyclePolicyText=text)
    assert "lifecycle rule is another one" in aws.run("publish", "--no-push", status=1)
    kept = ecr.get_lifecycle_policy(repositoryName=REPOSITORIES[0])["lifecyclePolicyText"]
    assert json.loads(kept) == json.loads(text)


def test_a_repository_of_somebody_else_is_not_touched(aws: Aws) -> None:
    aws.client("ecr").create_repository(repositoryName=REPOSITORIES[0])
    before = aws.repositories()
    assert "is not ours" in aws.run("publish", "--no-push", status=1)
    assert aws.repositories() == before
    aws.run("teardown", "--poll", "0.1", "--timeout", "1")
    assert aws.repositories() == before


# --- What can go wrong, in both programs ---------------------------------------------------------


@pytest.mark.parametrize("program", ["publish", "teardown"])
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("ExpiredToken", "Your AWS credentials have expired: log in again"),
        ("InvalidClientTokenId", "AWS does not know these credentials"),
        ("AccessDenied", "AWS denies GetCallerIdentity: user/reader"),
        ("Strange", "AWS answers GetCallerIdentity with Strange: user/reader"),
    ],
)
def test_errors_of_the_login_are_explained(
    aws: Aws, program: str, code: str, sentence: str
) -> None:
    aws.errors["GetCallerIdentity"] = (403, code)
    assert sentence in aws.run(program, status=1, **no_docker(aws, program))


def no_docker(aws: Aws, program: str) -> dict[str, str]:
    """publish looks for images before it asks AWS: give it a docker command that has them."""
    if program == "publish":
        folder = aws.folder / "bin"
        folder.mkdir(exist_ok=True)
        script(folder / "docker", 'print(\'[{"Architecture": "amd64", "Id": "sha256:0"}]\')')
        return {"PATH": f"{folder}:{os.environ['PATH']}"}
    return {}


def script(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("operation", "code", "sentence"),
    [
        ("CreateRepository", "LimitExceededException", "A quota of the account is used up"),
        ("CreateRepository", "AccessDeniedException", "AWS denies CreateRepository"),
        ("CreateRepository", "ExpiredTokenException", "have expired"),
        ("DescribeRepositories", "UnrecognizedClientException", "does not know these credentials"),
    ],
)
def test_errors_on_the_way_are_explained(
    aws: Aws, operation: str, code: str, sentence: str
) -> None:
    aws.errors[operation] = (400, code)
    assert sentence in aws.run("publish", "--no-push", status=1)
    aws.errors.clear()
    aws.run("publish", "--no-push")


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "There are no AWS credentials here",
        ),
        ({"AWS_SECRET_ACCESS_KEY": None}, "Your AWS credentials are incomplete"),
        ({"AWS_PROFILE": "elsewhere"}, "elsewhere"),
        ({"AWS_DEFAULT_REGION": "eu-west-3"}, "says eu-west-3 and eks/cluster.yaml says us-west-2"),
        ({"AWS_REGION": "eu-west-3"}, "says eu-west-3 and eks/cluster.yaml says us-west-2"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS cannot be reached"),
    ],
)
def test_what_is_wrong_with_the_configuration_is_said(
    aws: Aws, env: dict[str, str | None], sentence: str
) -> None:
    assert sentence in aws.run("publish", "--no-push", status=1, **env)
    assert sentence in aws.run("teardown", status=1, **env)
    assert aws.repositories() == {}


def test_the_region_that_aws_and_eksctl_would_take_is_the_one_that_counts(aws: Aws) -> None:
    aws.env |= {"AWS_REGION": CLUSTER.region, "AWS_DEFAULT_REGION": "eu-west-3"}
    assert aws.run("teardown", "--dry-run").startswith(f"account {ACCOUNT}, {CLUSTER.region}, ")


def test_another_account_is_refused(aws: Aws) -> None:
    for program, options in (("publish", ["--no-push"]), ("teardown", [])):
        output = aws.run(program, *options, "--account", "999999999999", status=1)
        assert f"credentials of account {ACCOUNT}, not of 999999999999" in output
    assert aws.repositories() == {}


def test_keys_that_nobody_has_are_refused(aws: Aws) -> None:
    """By moto's own access control, which checks signatures."""
    reset = f"{aws.moto}/moto-api/reset-auth"
    requests.post(reset, data=b"0", timeout=60).raise_for_status()
    try:
        output = aws.run("publish", "--no-push", status=1, AWS_ENDPOINT_URL=aws.moto)
        assert output.startswith("AWS does not know these credentials")
    finally:
        requests.post(reset, data=b"inf", timeout=60).raise_for_status()


def test_docker_problems_are_said(aws: Aws) -> None:
    folder = aws.folder / "bin"
    folder.mkdir()
    output = aws.run("publish", status=1, PATH=str(folder))
    assert output == "There is no docker command: install Docker, or give --no-push.\n"
    script(folder / "docker", "raise SystemExit('Cannot connect to the Docker daemon')")
    path = f"{folder}:{os.environ['PATH']}"
    assert "Cannot connect to the Docker daemon" in aws.run("publish", status=1, PATH=path)
    script(folder / "docker", 'print(\'[{"Architecture": "arm64", "Id": "sha256:0"}]\')')
    output = aws.run("publish", status=1, PATH=path)
    assert "is made for arm64 and the nodes are amd64" in output
    assert aws.repositories() == {}
    assert "has no tag" in aws.run("publish", "clothing-gateway", status=1)
    assert "rehearsals" in aws.run("publish", "--registry", "registry.example:5000", status=1)


# --- publish with a Docker engine and a registry -------------------------------------------------


def htpasswd(user: str, password: str) -> str:
    """A line of a password file, hashed as registries want it; skip where the C library cannot."""
    try:
        library = ctypes.CDLL("libcrypt.so.1")
    except OSError:
        pytest.skip("there is no libcrypt.so.1, which hashes the registry's password")
    library.crypt.restype = ctypes.c_char_p
    hashed = library.crypt(password.encode(), f"$2b$05${uuid.uuid4().hex[:21]}u".encode())
    if not hashed.startswith(b"$2b$"):
        pytest.skip("the libcrypt.so.1 here does not know bcrypt")
    return f"{user}:{hashed.decode()}\n"


def docker(*arguments: str, stdin: bytes | None = None) -> str:
    done = subprocess.run(["docker", *arguments], input=stdin, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


@pytest.fixture
def registry(aws: Aws) -> Iterator[str]:
    """A registry on loopback that knows one user: the one of ECR's token."""
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("no Docker engine answers")
    if not shutil.which("docker-registry"):
        pytest.skip("there is no docker-registry command (Debian's package docker-registry)")
    (aws.folder / "htpasswd").write_text(htpasswd("AWS", f"{ACCOUNT}-auth-token"))
    address = f"127.0.0.1:{free_port()}"
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(aws.folder / "registry")}},
        "http": {"addr": address},
        "auth": {"htpasswd": {"realm": "test", "path": str(aws.folder / "htpasswd")}},
    }
    (aws.folder / "registry.yml").write_text(json.dumps(config))
    with (aws.folder / "registry.log").open("wb") as log:
        command = ["docker-registry", "serve", str(aws.folder / "registry.yml")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        eventually(lambda: status_of(address) == 401, "the registry asks for a password")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def status_of(address: str, path: str = "/v2/", **options: Any) -> int | None:
    with suppress(requests.ConnectionError):
        return requests.get(f"http://{address}{path}", timeout=60, **options).status_code
    return None


@pytest.fixture
def small_images(registry: str) -> Iterator[list[str]]:
    """Both images under a tag of their own, with nothing in them but a file."""
    tag = f"test-{uuid.uuid4().hex[:8]}"
    images = [f"{image.partition(':')[0]}:{tag}" for image in IMAGES]
    for image in images:
        dockerfile = f"FROM scratch\nLABEL test={image}\n".encode()
        docker("build", "--quiet", f"--tag={image}", "-", stdin=dockerfile)
    yield images
    docker("image", "rm", "--force", *images)


@pytest.mark.docker
def test_images_are_pushed_and_no_credential_stays(
    aws: Aws, registry: str, small_images: list[str]
) -> None:
    known = aws.folder / ".docker/config.json"
    known.parent.mkdir()
    known.write_text("{}")
    calls = aws.folder / "calls"
    (aws.folder / "bin").mkdir()
    script(
        aws.folder / "bin/docker",  # says how it was called, and is Docker's command
        "import os, sys\n"
        f"with open({str(calls)!r}, 'a') as log:\n"
        "    print(os.environ.get('DOCKER_CONFIG'), *sys.argv[1:], file=log)\n"
        f"os.execv({shutil.which('docker')!r}, sys.argv)",
    )
    arguments = [*small_images, "--registry", registry, "--allow", "203.0.113.0/24"]
    path = f"{aws.folder / 'bin'}:{os.environ['PATH']}"
    output = aws.run("publish", *arguments, PATH=path)

    basic = ("AWS", f"{ACCOUNT}-auth-token")
    for deployment in named(kustomize(aws.folder / "overlay"), "Deployment").values():
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        host, _, rest = image.partition("/")
        name, _, digest = rest.partition("@")
        assert (host, name in REPOSITORIES) == (registry, True) and digest in output
        manifest = f"/v2/{name}/manifests/{digest}"
        assert status_of(registry, manifest) == 401
        assert status_of(registry, manifest, auth=basic) == 200

    called = calls.read_text()
    assert f"login --username AWS --password-stdin {registry}" in called
    assert "auth-token" not in called
    (folder,) = {line.split()[0] for line in called.splitlines() if " push " in line}
    assert folder.startswith(str(aws.folder)) and not Path(folder).exists()
    assert known.read_text() == "{}"
    written = [path for path in aws.folder.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert registry not in docker("image", "ls", "--format={{.Repository}}")
    assert set(re.findall("sha256:.*", aws.run("publish", *arguments))) == set(
        re.findall("sha256:.*", output)
    )


@pytest.mark.docker
def test_a_push_that_fails_is_said_and_repeated(
    aws: Aws, registry: str, small_images: list[str]
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    error = aws.run("publish", *small_images, "--registry", nobody, status=1)
    assert error.startswith("docker login failed: ") and "refused" in error
    assert not (aws.folder / "overlay").exists()
    assert nobody not in docker("image", "ls", "--format={{.Repository}}")
    aws.run("publish", *small_images, "--registry", registry)
    assert (aws.folder / "overlay").exists()


@pytest.mark.docker
def test_a_tag_is_never_given_to_another_image(
    aws: Aws, registry: str, small_images: list[str]
) -> None:
    aws.run("publish", "--no-push")
    tag = small_images[0].partition(":")[2]
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    local = docker("image", "inspect", "--format={{.Id}}", small_images[0])

    def put(config: str, tag: str) -> str:
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": config}}
        answer = aws.client("ecr").put_image(
            repositoryName=REPOSITORIES[0], imageManifest=json.dumps(manifest), imageTag=tag
        )
        return answer["image"]["imageId"]["imageDigest"]

    digest = put(local, tag)
    output = aws.run("publish", *small_images, "--registry", registry)
    assert digest in output and f"pushing {small_images[0]}" not in output
    other = f"{small_images[0]}-other"
    docker("tag", small_images[0], other)
    try:
        put(f"sha256:{'0' * 64}", f"{tag}-other")
        error = aws.run("publish", other, small_images[1], "--registry", registry, status=1)
        assert f"has another image under the tag {tag}-other already" in error
    finally:
        docker("image", "rm", other)


# --- teardown ------------------------------------------------------------------------------------

QUICK = ["--poll", "0.1", "--timeout", "30"]
NOTHING = (
    f"0 left with the tag project={CLUSTER.project}\n"
    f"0 things without that tag bear the name {CLUSTER.name}\n"
)


class Cloud:
    """What a reader's account holds after the lesson, and some things of somebody else's."""

    def __init__(self, aws: Aws):
        self.aws = aws
        self.eks, self.elb, self.elbv2 = (aws.client(name) for name in ("eks", "elb", "elbv2"))
        self.subnet = aws.client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]

    def make_cluster(self, name: str = CLUSTER.name, tags: dict[str, str] = CLUSTER.tags) -> None:
        role = f"arn:aws:iam::{ACCOUNT}:role/eks"
        network = {"subnetIds": [self.subnet]}
        self.eks.create_cluster(name=name, roleArn=role, resourcesVpcConfig=network, tags=tags)
        for group in ("cpu", "gpu"):
            self.eks.create_nodegroup(
                clusterName=name, nodegroupName=group, subnets=[self.subnet], nodeRole=role
            )

    def delete_cluster(self) -> None:
        for group in ("cpu", "gpu"):
            self.eks.delete_nodegroup(clusterName=CLUSTER.name, nodegroupName=group)
        self.eks.delete_cluster(name=CLUSTER.name)

    def make_stacks(self, cluster: str = CLUSTER.name, tags: list[dict[str, str]] = OURS) -> None:
        """What eksctl leaves when only the cluster itself is deleted."""
        group = {"Type": "AWS::EC2::SecurityGroup", "Properties": {"GroupDescription": "x"}}
        template = {"Resources": {"Group": group}}
        for part in ("cluster", "nodegroup-cpu"):
            self.aws.client("cloudformation").create_stack(
                StackName=f"eksctl-{cluster}-{part}",
                TemplateBody=json.dumps(template),
                Tags=[*tags, {"Key": "alpha.eksctl.io/cluster-name", "Value": cluster}],
            )

    def make_load_balancer(self, name: str, tags: list[dict[str, str]]) -> Callable[[], Any]:
        """Make a network load balancer; return what deletes it."""
        answer = self.elbv2.create_load_balancer(
            Name=name, Type="network", Subnets=[self.subnet], Tags=tags
        )
        arn = answer["LoadBalancers"][0]["LoadBalancerArn"]
        return lambda: self.elbv2.delete_load_balancer(LoadBalancerArn=arn)

    def make_classic(self, name: str, tags: list[dict[str, str]]) -> None:
        listener = {"Protocol": "TCP", "LoadBalancerPort": 80, "InstancePort": 80}
        self.elb.create_load_balancer(
            LoadBalancerName=name, Listeners=[listener], Subnets=[self.subnet], Tags=tags
        )

    def make_target_group(self, name: str, tags: list[dict[str, str]]) -> str:
        """Make the part of a load balancer that knows the nodes; return its ARN."""
        vpc = self.aws.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
        answer = self.elbv2.create_target_group(
            Name=name, Protocol="TCP", Port=80, VpcId=vpc, Tags=tags
        )
        return str(answer["TargetGroups"][0]["TargetGroupArn"])

    def make(self, kind: str, tags: list[dict[str, str]]) -> str:
        """Make something of EC2's, and return its id."""
        ec2 = self.aws.client("ec2")
        tagged = {"TagSpecifications": [{"ResourceType": kind, "Tags": tags}]}
        if kind == "instance":
            image = ec2.describe_images()["Images"][0]["ImageId"]
            answer = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, **tagged)
            return str(answer["Instances"][0]["InstanceId"])
        if kind == "volume":
            zone = f"{CLUSTER.region}a"
            return str(ec2.create_volume(AvailabilityZone=zone, Size=1, **tagged)["VolumeId"])
        if kind == "network-interface":
            answer = ec2.create_network_interface(SubnetId=self.subnet, **tagged)
            return str(answer["NetworkInterface"]["NetworkInterfaceId"])
        if kind == "security-group":
            answer = ec2.create_security_group(GroupName="x", Description="x", **tagged)
            return str(answer["GroupId"])
        assert kind == "vpc"
        return str(ec2.create_vpc(CidrBlock="10.0.0.0/16", **tagged)["Vpc"]["VpcId"])

    def make_foreign(self) -> None:
        """Names like ours, without the tag, or of another cluster."""
        self.make_cluster("other", {"project": "something-else"})
        self.make_stacks("other", [{"Key": "project", "Value": "something-else"}])
        other = {"Key": "kubernetes.io/cluster/other", "Value": "owned"}
        self.make_load_balancer("foreign", [other])
        self.make_classic("foreign-classic", [other])
        ecr = self.aws.client("ecr")
        ecr.create_repository(repositoryName=f"{CLUSTER.project}/theirs")
        ecr.create_repository(repositoryName="unrelated", tags=[{"Key": "project", "Value": "x"}])

    def state(self) -> dict[str, list[str]]:
        balancers = self.elbv2.describe_load_balancers()["LoadBalancers"]
        classic = self.elb.describe_load_balancers()["LoadBalancerDescriptions"]
        stacks = self.aws.client("cloudformation").describe_stacks()["Stacks"]
        return {
            "clusters": sorted(self.eks.list_clusters()["clusters"]),
            "balancers": sorted(each["LoadBalancerName"] for each in [*balancers, *classic]),
            "stacks": sorted(each["StackName"] for each in stacks),
            "repositories": sorted(self.aws.repositories()),
        }


@pytest.fixture
def cloud(aws: Aws) -> Cloud:
    return Cloud(aws)


class Kubernetes:
    """The part of the Kubernetes API that kubectl needs to list and to delete Services."""

    def __init__(self) -> None:
        self.services = {"gateway": "LoadBalancer", "model-server": "ClusterIP"}
        self.deleted: list[str] = []
        self.tokens: set[str | None] = set()
        self.on_delete: Callable[[], Any] = lambda: None

    def handler(self) -> type[Quiet]:
        api = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                api.tokens.add(self.headers.get("Authorization"))
                path = self.path.partition("?")[0]
                verbs = ["delete", "get", "list"]
                services = {"name": "services", "singularName": "service", "kind": "Service"}
                answers: dict[str, Any] = {
                    "/api": {"kind": "APIVersions", "versions": ["v1"]},
                    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
                    "/api/v1": {
                        **{"kind": "APIResourceList", "groupVersion": "v1"},
                        "resources": [{**services, "namespaced": True, "verbs": verbs}],
                    },
                    "/api/v1/services": {
                        **{"kind": "ServiceList", "apiVersion": "v1", "metadata": {}},
                        "items": [self.service(name) for name in api.services],
                    },
                }
                self.answer(answers.get(path, {}), 200 if path in answers else 404)

            def do_DELETE(self) -> None:
                name = self.path.partition("?")[0].rpartition("/")[2]
                api.deleted.append(self.path.partition("?")[0])
                self.answer(self.service(name))
                api.on_delete()

            def service(self, name: str) -> dict[str, Any]:
                return {
                    **{"apiVersion": "v1", "kind": "Service"},
                    "metadata": {"name": name, "namespace": "clothes"},
                    "spec": {"type": api.services[name]},
                }

        return Handler


def certificate(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A certificate for 127.0.0.1 that nobody else has signed: a TLS context, and the PEM."""
    from ipaddress import IPv4Address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1))
    builder = builder.not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(alternative, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "pem").write_bytes(pem + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pem")
    return context, pem.decode()


@pytest.fixture
def kubernetes(cloud: Cloud) -> Iterator[Kubernetes]:
    """A cluster of ours whose API answers, with an ``aws`` command that logs in to it."""
    from moto.eks.models import eks_backends

    api = Kubernetes()
    cloud.make_cluster()
    context, pem = certificate(cloud.aws.folder)
    status = {"token": "token-of-the-cluster"}
    login = {"apiVersion": "client.authentication.k8s.io/v1beta1", "kind": "ExecCredential"}
    (cloud.aws.folder / "bin").mkdir()
    script(cloud.aws.folder / "bin/aws", f"print({json.dumps({**login, 'status': status})!r})")
    cloud.aws.env["PATH"] = f"{cloud.aws.folder / 'bin'}:{cloud.aws.env['PATH']}"
    for port in serve(api.handler(), context):
        cluster = eks_backends[ACCOUNT][CLUSTER.region].clusters[CLUSTER.name]
        cluster.endpoint = f"https://127.0.0.1:{port}"
        cluster.certificate_authority = {"data": base64.b64encode(pem.encode()).decode()}
        yield api


def test_teardown_deletes_everything_in_order_and_nothing_else(
    aws: Aws, cloud: Cloud, kubernetes: Kubernetes
) -> None:
    cloud.make_foreign()
    foreign = cloud.state()
    foreign["clusters"].remove(CLUSTER.name)
    aws.run("publish", "--no-push")
    cloud.make_stacks()
    vanish = cloud.make_load_balancer("ours", [OF_CLUSTER, *OURS])
    seen: dict[str, list[str]] = {}

    def late() -> None:
        time.sleep(3)  # as AWS takes its time
        seen.update(cloud.state())
        vanish()

    kubernetes.on_delete = threading.Thread(target=late, daemon=True).start
    output = aws.finish(aws.start("teardown", *QUICK))
    assert kubernetes.deleted == ["/api/v1/namespaces/clothes/services/gateway"]
    assert kubernetes.tokens == {"Bearer token-of-the-cluster"}
    # While the load balancer was still there, so was the cluster whose controller deletes it.
    assert CLUSTER.name in seen["clusters"] and len(seen["stacks"]) == 4
    assert cloud.state() == foreign
    order = ["gateway deleted", "load balancers gone", "cluster clothes gone", "the stack"]
    places = [output.index(words) for words in [*order, "repository", "0 left with the tag"]]
    assert places == sorted(places)
    assert not list(aws.folder.rglob("kubeconfig"))
    assert aws.run("teardown", *QUICK).endswith(NOTHING)


def test_a_load_balancer_that_does_not_vanish_keeps_the_cluster(
    aws: Aws, cloud: Cloud, kubernetes: Kubernetes
) -> None:
    vanish = cloud.make_load_balancer("ours", [OF_CLUSTER])
    error = aws.run("teardown", "--poll", "0.1", "--timeout", "2", status=1)
    assert re.search("After 2 seconds there is still .*ours.*: run this again", error)
    assert cloud.state()["clusters"] == [CLUSTER.name] and kubernetes.deleted
    vanish()
    aws.run("teardown", *QUICK)
    assert cloud.state()["clusters"] == []


def test_a_teardown_interrupted_while_waiting_goes_on(
    aws: Aws, cloud: Cloud, kubernetes: Kubernetes
) -> None:
    vanish = cloud.make_load_balancer("ours", [OF_CLUSTER])
    process = aws.start("teardown", *QUICK)
    eventually(lambda: kubernetes.deleted, "the Service is deleted", seconds=120)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[1].startswith("Interrupted.")
    # A signal that comes during an import makes Python end by the signal: 130 to a shell, too.
    assert process.returncode in (130, -signal.SIGINT)
    vanish()
    aws.run("teardown", *QUICK)
    assert cloud.state() == {key: [] for key in cloud.state()}


def test_nothing_is_deleted_when_services_cannot_be(aws: Aws, cloud: Cloud) -> None:
    cloud.make_cluster()
    cloud.make_load_balancer("ours", [OF_CLUSTER])
    before = cloud.state()
    folder = aws.folder / "bin"
    folder.mkdir()
    script(folder / "aws", "raise SystemExit('expired')")
    path = f"{folder}:{os.environ['PATH']}"
    assert "nothing was deleted" in aws.run("teardown", *QUICK, status=1, PATH=path)
    (folder / "aws").unlink()
    assert "takes kubectl and aws" in aws.run("teardown", *QUICK, status=1, PATH=str(folder))
    assert cloud.state() == before


def test_load_balancers_and_stacks_without_a_cluster_are_deleted(aws: Aws, cloud: Cloud) -> None:
    cloud.make_foreign()
    foreign = cloud.state()
    cloud.make_stacks()
    cloud.make_load_balancer("ours", [OF_CLUSTER, *OURS])
    cloud.make_classic("ours-classic", [OF_CLUSTER, *OURS])
    aws.run("teardown", *QUICK)
    assert cloud.state() == foreign


def test_more_load_balancers_than_one_answer_has_tags_for(aws: Aws, cloud: Cloud) -> None:
    for number in range(22):
        cloud.make_load_balancer(f"foreign-{number}", [{"Key": "project", "Value": "x"}])
    cloud.make_load_balancer("ours", OURS)
    aws.run("teardown", *QUICK)
    assert len(cloud.state()["balancers"]) == 22


def test_a_cluster_of_somebody_else_with_our_name_is_not_touched(aws: Aws, cloud: Cloud) -> None:
    cloud.make_cluster(tags={"project": "something-else"})
    cloud.make_load_balancer("theirs", [OF_CLUSTER])
    before = cloud.state()
    assert f"the cluster {CLUSTER.name} is not ours" in aws.run("teardown", *QUICK)
    assert cloud.state() == before


def test_a_dry_run_of_teardown_lists_all_and_deletes_nothing(aws: Aws, cloud: Cloud) -> None:
    aws.run("publish", "--no-push")
    cloud.make_cluster()
    cloud.make_load_balancer("ours", [OF_CLUSTER])
    before = cloud.state()
    output = aws.run("teardown", "--dry-run", *QUICK)
    assert cloud.state() == before
    for name in ("/ours/", f"cluster/{CLUSTER.name}", *REPOSITORIES, "4 in all"):
        assert name in output


def test_a_target_group_whose_load_balancer_is_gone_is_deleted(aws: Aws, cloud: Cloud) -> None:
    theirs = cloud.make_target_group("theirs", [{"Key": "project", "Value": "x"}])
    ours = cloud.make_target_group("ours", OURS)
    assert f"would delete {ours}\n1 in all" in aws.run("teardown", "--dry-run")
    assert aws.run("teardown", *QUICK).endswith(NOTHING)
    left = cloud.elbv2.describe_target_groups()["TargetGroups"]
    assert [each["TargetGroupArn"] for each in left] == [theirs]


def test_a_target_group_goes_after_its_load_balancer(aws: Aws, cloud: Cloud) -> None:
    cloud.make_load_balancer("ours", OURS)
    target = cloud.make_target_group("ours", OURS)
    (balancer,) = cloud.elbv2.describe_load_balancers()["LoadBalancers"]
    cloud.elbv2.create_listener(
        LoadBalancerArn=balancer["LoadBalancerArn"],
        **{"Protocol": "TCP", "Port": 80},
        DefaultActions=[{"Type": "forward", "TargetGroupArn": target}],
    )
    output = aws.run("teardown", *QUICK)
    assert output.index("load balancers gone") < output.index(f"{target} deleted")
    assert cloud.elbv2.describe_target_groups()["TargetGroups"] == []


@pytest.mark.parametrize("kind", ["instance", "volume", "network-interface", "security-group"])
def test_what_a_dry_run_would_delete_is_deleted(aws: Aws, cloud: Cloud, kind: str) -> None:
    """Although no load balancer, cluster, stack or repository takes it along."""
    name = cloud.make(kind, OURS)
    assert re.search(f"would delete arn:.*:{kind}/{name}\n", aws.run("teardown", "--dry-run"))
    output = aws.run("teardown", *QUICK)
    assert f"{kind}/{name} deleted" in output and output.endswith(NOTHING)


def test_what_is_part_of_another_cluster_stays(aws: Aws, cloud: Cloud) -> None:
    """Although it has the tag: a second cluster of the same project, under another name."""
    other = {"Key": "kubernetes.io/cluster/other", "Value": "owned"}
    of_eksctl = {"Key": "alpha.eksctl.io/cluster-name", "Value": "other"}
    instance, volume = cloud.make("instance", [*OURS, other]), cloud.make("volume", [*OURS, other])
    names = [instance, volume, cloud.make("security-group", [*OURS, of_eksctl])]
    dry = aws.run("teardown", "--dry-run")
    output = aws.run("teardown", "--poll", "0.1", "--timeout", "1", status=1)
    for name in names:
        assert re.search(f"would leave arn:.*/{name}: delete it by hand\n", dry)
        assert f"/{name}\n" in output and f"{name} deleted" not in output


def test_a_launch_template_is_deleted_and_stays_deleted(aws: Aws) -> None:
    """AWS's list by tag goes on naming it for a while."""
    ec2 = aws.client("ec2")
    made = ec2.create_launch_template(LaunchTemplateName="x", LaunchTemplateData={})
    name = made["LaunchTemplate"]["LaunchTemplateId"]
    arn = f"arn:aws:ec2:{CLUSTER.region}:{ACCOUNT}:launch-template/{name}"
    mapping = {"ResourceARN": arn, "Tags": OURS}
    aws.replies["GetResources"] = {"PaginationToken": "", "ResourceTagMappingList": [mapping]}
    assert aws.run("teardown", *QUICK).endswith(NOTHING)
    assert ec2.describe_launch_templates()["LaunchTemplates"] == []
    assert aws.run("teardown", *QUICK).endswith(NOTHING)


def test_what_cannot_be_deleted_is_named_with_the_cause(aws: Aws, cloud: Cloud) -> None:
    network, volume = cloud.make("vpc", OURS), cloud.make("volume", OURS)
    output = aws.run("teardown", "--dry-run")
    prefix = f"arn:aws:ec2:{CLUSTER.region}:{ACCOUNT}"
    assert f"would leave {prefix}:vpc/{network}: delete it by hand\n" in output
    aws.errors["DeleteVolume"] = (400, "VolumeInUse")
    output = aws.run("teardown", "--poll", "0.1", "--timeout", "1", status=1)
    assert f"{prefix}:volume/{volume}: AWS answers DeleteVolume with VolumeInUse" in output
    assert f"{prefix}:vpc/{network}\n2 left with the tag" in output
    aws.errors.clear()
    aws.client("ec2").delete_vpc(VpcId=network)
    assert aws.run("teardown", *QUICK).endswith(NOTHING)


def test_what_bears_the_name_without_the_tag_is_named_and_kept(aws: Aws, cloud: Cloud) -> None:
    """Nothing of it costs nothing, and a tag that somebody else may have set is no proof."""
    kinds = ("volume", "network-interface", "security-group")
    names = [cloud.make(kind, [OF_CLUSTER]) for kind in kinds]
    network = {"Key": "cluster.k8s.amazonaws.com/name", "Value": CLUSTER.name}
    names.append(cloud.make("network-interface", [network]))
    names.append(cloud.make_target_group("named", [OF_CLUSTER]))
    cloud.make_load_balancer("named", [OF_CLUSTER])
    cloud.make("network-interface", [{**network, "Value": "other"}])
    logs = aws.client("logs")
    for name in (CLUSTER.name, f"{CLUSTER.name}-2"):
        logs.create_log_group(logGroupName=f"/aws/eks/{name}/cluster")
    names += ["/named/", f"log group /aws/eks/{CLUSTER.name}/cluster\n"]
    before = cloud.state()
    output = aws.run("teardown", *QUICK, status=1)
    assert all(re.search(f"without the tag: .*{re.escape(name)}", output) for name in names)
    assert (
        "0 left with the tag" in output and f"{len(names)} things without that tag bear" in output
    )
    assert cloud.state() == before

    cloud.make_cluster()
    output = aws.run("teardown", "--dry-run")  # which lists what the cluster will not take along
    assert f"without the tag: {names[0]}\n" in output and "2 things without" in output
    cloud.delete_cluster()
    cloud.make_cluster(tags={"project": "something-else"})
    assert "0 things without" in aws.run("teardown", "--dry-run"), "they may be that cluster's"


def test_the_policy_allows_what_publish_and_teardown_do(aws: Aws, cloud: Cloud) -> None:
    """Action by action, whatever the resource; for EKS, by the cluster in the path."""
    cloud.make_cluster()
    cloud.make_stacks()
    cloud.make_load_balancer("late", OURS)
    cloud.make_target_group("ours", OURS)
    for kind in ("instance", "volume", "network-interface", "security-group"):
        cloud.make(kind, OURS)
    aws.run("publish", "--no-push")
    cloud.delete_cluster()
    assert aws.run("teardown", *QUICK).endswith(NOTHING)
    cloud.make_cluster()
    assert aws.run("teardown", *QUICK).endswith(NOTHING)
    statements = json.loads((ROOT / "eks/iam-policy.json").read_text())["Statement"]
    wide = [{**each, "Resource": "*", "Condition": {}} for each in statements]
    policy = IAMPolicy(json.dumps({"Statement": wide}))
    for action in aws.actions:
        service, _, operation = action.partition(":")
        if service == "eks":
            assert operation.split()[1].startswith(f"/clusters/{CLUSTER.name}"), operation
        else:
            action = action.replace("tagging:", "tag:")
            assert policy.is_action_permitted(action) == PermissionResult.PERMITTED, action
    assert {"ec2:DeleteVolume", "ecr:CreateRepository", "logs:DescribeLogGroups"} <= aws.actions
    assert policy.is_action_permitted("ec2:CreateVolume") == PermissionResult.NEUTRAL


def test_what_is_gone_is_not_believed_to_be_left(aws: Aws, cloud: Cloud) -> None:
    """AWS's list by tag lags behind; what the services say of their own counts."""
    prefix = f"{CLUSTER.region}:{ACCOUNT}"
    gone = [
        f"arn:aws:ecr:{prefix}:repository/{REPOSITORIES[0]}",
        f"arn:aws:eks:{prefix}:cluster/{CLUSTER.name}",
        f"arn:aws:eks:{prefix}:nodegroup/{CLUSTER.name}/cpu/1",
        f"arn:aws:elasticloadbalancing:{prefix}:loadbalancer/net/ours/1",
        f"arn:aws:cloudformation:{prefix}:stack/eksctl-{CLUSTER.name}-cluster/1",
    ]
    there = f"arn:aws:eks:{prefix}:cluster/{CLUSTER.name}-2"
    mappings = [{"ResourceARN": arn, "Tags": OURS} for arn in [*gone, there]]
    aws.replies["GetResources"] = {"PaginationToken": "", "ResourceTagMappingList": mappings}
    output = aws.run("teardown", "--poll", "0.1", "--timeout", "1", status=1)
    assert f"{there}\n1 left with the tag" in output
    assert not [arn for arn in gone if f"{arn}\n" in output]


def test_credentials_that_expire_on_the_way(aws: Aws, cloud: Cloud) -> None:
    aws.run("publish", "--no-push")
    cloud.make_cluster()
    aws.errors["DeleteRepository"] = (400, "ExpiredTokenException")
    assert "have expired" in aws.run("teardown", *QUICK, status=1)
    assert cloud.state()["clusters"] == [] and cloud.state()["repositories"] == REPOSITORIES
    aws.errors.clear()
    aws.run("teardown", *QUICK)
    assert cloud.state()["repositories"] == []


def test_eksctl_deletes_the_cluster_where_it_is_installed(aws: Aws, cloud: Cloud) -> None:
    cloud.make_cluster()
    folder = aws.folder / "bin"
    folder.mkdir()
    path = f"{folder}:{os.environ['PATH']}"
    script(folder / "eksctl", "raise SystemExit('no')")
    assert "eksctl failed" in aws.run("teardown", *QUICK, status=1, PATH=path)
    assert cloud.state()["clusters"] == [CLUSTER.name]
    aws.run("teardown", "--no-eksctl", *QUICK, PATH=path)
    assert cloud.state()["clusters"] == []
    cloud.make_cluster()
    log = aws.folder / "eksctl.log"
    script(folder / "eksctl", f"import sys\nopen({str(log)!r}, 'w').write(' '.join(sys.argv[1:]))")
    aws.run("teardown", *QUICK, PATH=path)
    expected = f"delete cluster --name={CLUSTER.name} --region={CLUSTER.region} --wait"
    assert log.read_text().startswith(expected)
    assert cloud.state()["clusters"] == []
