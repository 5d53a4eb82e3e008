"""docs/cheat-sheet.md: its commands exist, with their flags; those that only ask are run."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import boto3
import pytest
from helpers.basics import ROOT, SAMPLES
from helpers.servers import Server, WebHost, serve

from workbook.engine import SERVING_IMAGE

BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs/cheat-sheet.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.+?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if line.strip()
]
# The words of each command, without its comment; a pipe joins two commands.
COMMANDS = [
    [word for word in shlex.split(part, comments=True) if word]
    for line in LINES
    for part in line.split(" | ")
]
# Where each program is, for those that a clone brings with it.
PROGRAMS = {"pipenv": ROOT / ".tools/bin/pipenv", "kubectl": BIN / "kubectl"}
# What the aws command has beside the operations of the API.
AWS_OWN = {("ecr", "get-login-password"), ("eks", "update-kubeconfig")}


def commands_of(program: str) -> list[list[str]]:
    found = [words for words in COMMANDS if words[0].removeprefix(".venv/bin/") == program]
    assert found, program
    return found


@cache
def help_of(*words: str) -> str:
    """Return what a command's --help prints."""
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags(words: list[str]) -> list[str]:
    """The long options of a command, without what they are given, up to a lone --."""
    upto = words.index("--") if "--" in words else len(words)
    return [word.partition("=")[0] for word in words[:upto] if word.startswith("--")]


def check(words: list[str], text: str) -> None:
    missing = [flag for flag in flags(words) if not re.search(rf"{flag}(?![\w-])", text)]
    assert missing == [], shlex.join(words)


def test_every_command_is_of_a_program_that_is_checked_here() -> None:
    programs = {words[0].removeprefix(".venv/bin/") for words in COMMANDS}
    assert programs == {
        *("make", "saved_model_cli", "python", "docker", "curl", "jupyter", "pipenv"),
        *("kubectl", "kind", "aws", "eksctl"),
    }
    blocks = re.findall(r"```sh\n(.+?)```", PAGE, re.DOTALL)
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 100, "to be printed"
    assert f" {SERVING_IMAGE}\n" in PAGE


def test_make_has_the_targets() -> None:
    for _, target, *variables in commands_of("make"):
        command = ["make", "--dry-run", target, *variables]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0, target


def test_our_programs_have_the_flags() -> None:
    for words in commands_of("python"):
        assert words[1] == "-m"
        check(words, help_of(sys.executable, "-m", words[2]))


def test_saved_model_cli_can_be_called_like_this() -> None:
    from tensorflow.python.tools import saved_model_cli

    parser = saved_model_cli.create_parser()
    for _, *words in commands_of("saved_model_cli"):
        parser.parse_args(words)


@pytest.mark.parametrize("program", ["kubectl", "pipenv", "docker"])
def test_subcommands_exist_with_their_flags(program: str) -> None:
    path = shutil.which(PROGRAMS.get(program, program))
    if path is None:
        pytest.skip(f"there is no {program} command")
    compose = subprocess.run([path, "compose", "version"], capture_output=True).returncode
    for words in commands_of(program):
        depth = 1 + (words[1] in ("compose", "image", "system", "config", "set", "rollout"))
        if words[1] == "compose" and compose:
            continue
        text = help_of(path, *words[1 : 1 + depth])
        # Some print the help of the program where they do not know the subcommand.
        assert words[depth] in text.partition("\n\n\n")[0]
        check(words, text + (help_of(path, "options") if program == "kubectl" else ""))


def test_nbconvert_has_the_flags() -> None:
    text = help_of(str(BIN / "jupyter-nbconvert"))
    for words in commands_of("jupyter"):
        assert words[1] == "nbconvert"
        check(words, text)


def test_aws_has_the_operations() -> None:
    for words in commands_of("aws"):
        if tuple(words[1:3]) not in AWS_OWN:
            client = boto3.client(words[1], region_name="eu-west-1")  # type: ignore[call-overload]
            assert hasattr(client, words[2].replace("-", "_")), words


@pytest.mark.parametrize("program", ["kind", "eksctl"])
def test_programs_that_are_not_ours_are_checked_where_they_are(program: str) -> None:
    path = shutil.which(program) or pytest.skip(f"there is no {program} command here")
    for words in commands_of(program):
        check(words, help_of(path, *words[1:3]))


class HostOfPictures(WebHost):
    """A host that has one picture."""

    def do_GET(self) -> None:
        self.answer(200, SAMPLES[0].read_bytes(), Content_Type="image/png")


def test_what_only_asks_is_run(
    model_server: Server, start_gateway: Callable[..., Server], tmp_path: Path
) -> None:
    """Every curl of the page, against servers of ours."""
    curl = shutil.which("curl") or pytest.skip("there is no curl command")
    pixels = [[[0.0, 0.0, 0.0]] * 32] * 32
    (tmp_path / "request.json").write_text(f'{{"instances": [{pixels}]}}')
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    with serve(HostOfPictures) as host:
        gateway = start_gateway(model_server.grpc, ALLOWED_IMAGE_HOSTS=host)
        here = {
            "http://127.0.0.1:8501": model_server.http,
            "http://127.0.0.1:9696": gateway.http,
            "LINK": f"http://{host}/dress.png",
        }
        for words in commands_of("curl"):
            for known, own in here.items():
                words = [word.replace(known, own) for word in words]
            command = [curl, "--silent", "--show-error", "--fail-with-body", *words[1:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            assert "error" not in done.stdout or '"error_code": "OK"' in done.stdout
