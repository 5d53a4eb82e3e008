"""kubectl's commands in a rehearsal: what they print, held against what kubectl itself printed."""

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from helpers.basics import ROOT, eventually, free_port
from helpers.manifests import KUBE, run_kustomize

from workbook import autoscaler, pods, servers
from workbook.cluster import Cluster
from workbook.kubectl import Client, Kubectl, aligned, words_of

RECORDED = (ROOT / "tests/recorded/kubectl.txt").read_text()
EMBEDDED = Cluster("embedded", "asked for")
Say = Callable[..., str]


def recorded(command: str) -> list[str]:
    """What kubectl printed, as often as this command was recorded."""
    found = re.findall(rf"^\$ kubectl {command}\n(.*?)\n(?=\n\$|\n*\Z)", RECORDED, re.M | re.S)
    assert found, command
    return found


def cells(text: str) -> list[list[str]]:
    """The cells of a table, or the words and values of a description, line by line.

    What differs from pod to pod and from moment to moment is replaced by a word for it.
    """
    text = re.sub(r"\bping-[a-z0-9]{8,10}-[a-z0-9]{5}\b", "POD", text)
    text = re.sub(r"\b(?:127|10)\.\d+\.\d+\.\d+(?::\d+)?", "ADDRESS", text)
    text = re.sub(r"(?<=[ (])(?:\d+m)?\d+s\b|(?<= )\d+m\b", "TIME", text)
    return [re.split(" {2,}", line.strip()) for line in text.splitlines()]


def assert_describes(told: str, pod: str) -> None:
    """Assert that lines are some of those that kubectl told of a pod, in its order.

    How often an event was seen, and so which was the last, is left to chance; and so is what the
    system says of a port where nobody listens yet. Why there is no image depends on who looks for
    it where.
    """
    chance = r" *\(x\d+ over \w+\) *|(?<=Failed to pull image \"ping:002\": ).*"
    told = re.sub(
        r"http://(\S+)/ping\": Connection reset by peer",
        r'http://\1/ping": dial tcp \1: connect: connection refused',
        told,
    )
    about, events = re.sub(chance, "  ", told).split("Events:\n")
    (known,) = recorded(f"describe pod {pod}")
    its, its_events = re.sub(chance, "  ", known).split("Events:\n")
    lines = iter(cells(its))
    for line in cells(about):
        assert line in lines, line
    assert len(events.splitlines()) > 2
    for line in cells(events):
        assert line in cells(its_events), line


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubectl]:
    """The rehearsal of lesson 06, with its image and no object yet."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setattr(Kubectl, "opened", {})
    kubectl = Kubectl(EMBEDDED, "ping")
    kubectl.load("ping:001", "kube-config/ping/Dockerfile", context="kube-config/ping")
    yield kubectl
    kubectl.close()


@pytest.fixture
def say(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]) -> Say:
    """Do a command, and return what it printed below the line that says who did it."""

    def say(command: str, check: bool = True) -> str:
        capsys.readouterr()
        kubectl(command, check)
        first, _, rest = capsys.readouterr().out.partition("\n")
        assert first == f"rehearsal: {command}"
        return rest.removesuffix("\n")

    return say


def test_objects_are_applied_in_kubectls_words(say: Say, tmp_path: Path) -> None:
    first, again = recorded("apply --kustomize kube-config/ping")
    assert say("apply --kustomize kube-config/ping") == first
    assert say("apply --kustomize=kube-config/ping") == again
    folder = tmp_path.resolve()
    overlay = {"resources": ["../ping"], "images": [{"name": "ping", "newTag": "002"}]}
    (folder / "own").mkdir()
    (folder / "ping").symlink_to(KUBE / "ping")
    (folder / "own/kustomization.yaml").write_text(json.dumps(overlay))
    text = say(f"apply --kustomize {folder / 'own'}")
    assert [text] == recorded("apply --kustomize OVERLAY")


def test_all_kinds_have_the_names_that_kubectl_gives_them(say: Say) -> None:
    assert [say("apply --kustomize kube-config/base")] == recorded(
        "apply --kustomize kube-config/base"
    )
    file = "create --save-config --filename kube-config/ping/ping-namespace.yaml"
    assert [say(file)] == recorded(file)
    tier = "app.kubernetes.io/component=gateway"
    chosen = say(f"apply --kustomize kube-config/base --selector={tier}").splitlines()
    assert len(chosen) == 6
    changed = [line for line in chosen if not line.endswith("/gateway unchanged")]
    assert changed == ["poddisruptionbudget.policy/gateway configured"]


def test_lines_are_left_out_as_grep_leaves_them_out(say: Say) -> None:
    say("apply --kustomize kube-config/base")
    again = say("apply --kustomize kube-config/base | grep -v unchanged").splitlines()
    assert again == [
        f"poddisruptionbudget.policy/{name} configured" for name in ("gateway", "model-server")
    ]


def test_rollouts_are_told_as_kubectl_tells_them(say: Say, kubectl: Kubectl) -> None:
    say("apply --kustomize kube-config/ping")
    say("rollout status deployment/ping --timeout 60s")
    undo, nothing = recorded("rollout undo deployment/ping")
    with pytest.raises(RuntimeError, match="This failed, see above: kubectl rollout undo"):
        kubectl("rollout undo deployment/ping")
    assert say("rollout undo deployment/ping", check=False) == nothing
    scale = "scale deployment/ping --replicas 3"
    assert [say(scale)] == recorded(scale)
    lines = {*"\n".join(recorded("rollout status deployment/ping")).splitlines()}
    told = say("rollout status deployment/ping").splitlines()
    assert told[-1] in lines
    assert {re.sub(r"\d", "N", line) for line in told} <= {
        re.sub(r"\d", "N", line) for line in lines
    }
    change = "set image deployment/ping ping=ping:002"
    assert [say(change)] == recorded(change)
    status = "rollout status deployment/ping --timeout 1s"
    assert say(status, check=False).splitlines()[-1] == recorded(status)[0].splitlines()[-1]
    assert say("rollout undo deployment/ping") == undo
    say("rollout status deployment ping")


def test_pods_are_listed_described_and_deleted_as_kubectl_does(say: Say, kubectl: Kubectl) -> None:
    assert say("get pods") == "No resources found in ping namespace."
    say("apply --kustomize kube-config/ping")
    say("rollout status deployment/ping --timeout 60s")
    (pod,) = kubectl.pods("ping")
    (table,), (both,) = recorded("get pods"), recorded("get deployments,pods")
    header, _, restarted, running = cells(table)
    assert cells(say("get pods")) == [header, running]
    kubectl.kill(pod.name)
    eventually(lambda: kubectl.pods("ping") == [(pod.name, True, 1)], "it is started again")
    assert cells(say("get pods")) == [header, restarted]
    expected = cells(both.replace("2/2     1            2", "1/1     1            1"))
    shown = cells(say("get deployments,pods"))
    assert shown == [*expected[:4], expected[5]]

    assert_describes(say(f"describe pod {pod.name}"), "ping-7f56f8558f-d5v4t")

    delete = f"delete pod {pod.name}"
    assert cells(say(delete)) == cells(recorded("delete pod ping-7b4b9dbc4b-9494m")[0])
    say("rollout status deployment/ping")
    (pod,) = [each for each in kubectl.pods("ping") if each.ready]
    force = f"delete pod {pod.name} --force --grace-period 0"
    told = recorded("delete pod ping-7b4b9dbc4b-dxw9m --force --grace-period 0")
    assert cells(say(force)) == cells(told[0])


def test_an_image_that_nobody_has_built_is_described_as_kubectl_does(
    say: Say, kubectl: Kubectl
) -> None:
    assert kubectl.rehearsal
    del kubectl.rehearsal.images["ping:001"]
    say("apply --kustomize kube-config/ping")
    (pod,) = eventually(lambda: kubectl.pods("ping"), "there is a pod")
    eventually(lambda: "ImagePullBackOff" in say("get pods"), "it waits")
    found = say(f"describe pod {pod.name}").replace("ping:001", "ping:002")
    assert_describes(found.replace("ImagePullBackOff", "ErrImagePull"), "ping-6d87dfc5cd-dnjzv")
    events = say(f"describe pod {pod.name} | sed -n '/^Events:/,$p'")
    assert events.startswith("Events:\n") and "Failed to pull image" in events


def test_services_and_their_endpoints_are_listed_as_kubectl_does(
    say: Say, kubectl: Kubectl
) -> None:
    assert kubectl.rehearsal
    services = [each for each in run_kustomize(KUBE / "base") if each["kind"] == "Service"]
    services[0]["spec"]["type"] = "LoadBalancer"
    kubectl.rehearsal.apply(services)
    say("apply --kustomize kube-config/ping")
    told = re.sub(r"80:3\d{4}/TCP", "80/TCP", recorded("get services")[0])  # no port of a node here
    assert cells(say("get services")) == cells(told)
    say("scale deployment ping --replicas=3")
    say("rollout status deployment/ping")
    header, row = cells(recorded("get endpointslices")[0])
    shown = cells(say("get endpointslices"))
    assert shown[0] == header and shown[-1][1:] == row[1:]


def test_every_cluster_has_the_service_of_its_api(say: Say, kubectl: Kubectl) -> None:
    command = "get services --namespace default"
    assert [cells(say(command))] == [cells(recorded(command)[0])]
    spec = kubectl.object("service", "kubernetes", "default")["spec"]
    assert (spec["type"], spec["clusterIP"]) == ("ClusterIP", "10.96.0.1")


def test_an_autoscaler_knows_nothing_before_something_measures(say: Say, kubectl: Kubectl) -> None:
    say("apply --kustomize kube-config/template")
    say("rollout status deployment/app --timeout 60s")
    first = "autoscale deployment/app --cpu-percent=20 --min=1 --max=3"
    again = "autoscale deployment/app --cpu=20% --min=1 --max=3"
    assert [say(first)] == recorded(first)
    assert [say(again, check=False)] == recorded(again)
    assert cells(say("get hpa")) == cells(recorded("get hpa")[0])
    assert kubectl.object("horizontalpodautoscaler", "app")["status"] == {"currentReplicas": 1}


def test_an_autoscaler_adds_pods_under_load_up_to_its_most_and_takes_them_away_when_it_is_over(
    say: Say, kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaler, "SYNC_SECONDS", 1.0)
    say("apply --kustomize kube-config/template")
    say("rollout status deployment/app --timeout 60s")
    say("autoscale deployment/app --cpu=20% --min=1 --max=3")
    assert kubectl.rehearsal
    kubectl.rehearsal.start_metrics()
    port = free_port()
    kubectl.forward("service/app", 80, port)

    def reached_under_load() -> bool:
        for _ in range(200):
            requests.get(f"http://127.0.0.1:{port}/ping", timeout=10)
        return kubectl.object("horizontalpodautoscaler", "app")["status"]["currentReplicas"] == 3

    eventually(reached_under_load, "there are three pods")
    assert re.search(r" cpu: \d+%/20% +1 +3 +3 ", say("get hpa"))
    assert kubectl.object("deployment", "app")["spec"]["replicas"] == 3
    (metric,) = kubectl.object("horizontalpodautoscaler", "app")["status"]["currentMetrics"]
    assert metric["resource"]["current"]["averageUtilization"] >= 0
    window = '{"spec": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 2}}}}'
    patch = f"patch horizontalpodautoscaler/app --patch '{window}'"
    assert say(patch) == "horizontalpodautoscaler.autoscaling/app patched"

    def is_calm() -> bool:
        status = kubectl.object("horizontalpodautoscaler", "app")["status"]
        ready = kubectl.object("deployment", "app")["status"]["readyReplicas"]
        return status["desiredReplicas"] == status["currentReplicas"] == ready == 1

    eventually(is_calm, "there is one pod again")


def test_a_tunnel_stays_open_however_many_connections_it_tells_of(
    kubectl: Kubectl, tmp_path: Path
) -> None:
    many = "yes Handling connection for 9696 | head -n 10000"
    (tmp_path / "kubectl").write_text(f"echo Forwarding; {many}; touch {tmp_path}/told; sleep 60")
    there = Kubectl(Cluster("kubernetes", "", f"sh {tmp_path}/kubectl"), "home")
    there.forward("service/app", 80, free_port())
    eventually((tmp_path / "told").exists, "all has been told")
    there.close()


@pytest.mark.parametrize(
    ("behavior", "seconds"),
    [
        ({}, 300),
        ({"scaleDown": {"stabilizationWindowSeconds": 15}}, 15),
        ({"scaleUp": {"stabilizationWindowSeconds": 15}}, None),
        ({"scaleDown": {"stabilizationWindowSeconds": 15, "policies": []}}, None),
    ],
)
def test_an_autoscaler_waits_as_long_as_it_is_told_before_it_takes_pods_away(
    behavior: dict[str, Any], seconds: float | None
) -> None:
    """What else a `behavior` may say is beyond a rehearsal, which then scales nothing."""
    assert autoscaler.calm_seconds({"behavior": behavior} if behavior else {}) == seconds


@pytest.mark.parametrize(
    ("replicas", "usage", "wanted"),
    [(1, 0, 1), (1, 21.9, 1), (1, 22.1, 2), (2, 30, 3), (3, 900, 3), (3, 12, 2), (3, 0, 1)],
)
def test_an_autoscaler_wants_what_the_formula_says(
    replicas: int, usage: float, wanted: int
) -> None:
    target = {"averageUtilization": 20}
    spec = {"minReplicas": 1, "maxReplicas": 3, "metrics": [{"resource": {"target": target}}]}
    assert autoscaler.wish(replicas, usage, spec) == wanted


def test_objects_are_read_as_they_are_now(kubectl: Kubectl, tmp_path: Path) -> None:
    kubectl("apply --kustomize kube-config/template")
    service = kubectl.object("service", "app")["spec"]
    assert service["selector"] == {"app.kubernetes.io/name": "app"}
    assert (service["type"], service["clusterIP"]) == ("ClusterIP", "127.0.0.1")
    with pytest.raises(ValueError, match=r'autoscalers\.autoscaling "app" not found$'):
        kubectl.object("horizontalpodautoscaler", "app")
    answer = 'echo "[\\"$*\\"]"'
    (tmp_path / "kubectl").write_text(answer)
    there = Kubectl(Cluster("kubernetes", "", f"sh {tmp_path}/kubectl --context it"), "home")
    assert there.object("pod", "app", "own") == [
        "--context it --namespace own get pod app --output json"
    ]


def test_a_port_is_probed_in_kubernetes_words() -> None:
    port = free_port()
    refused = f"dial tcp 127.0.0.1:{port}: connect: connection refused"
    assert pods.check_tcp({}, f"127.0.0.1:{port}", 1) == refused
    with socket.create_server(("127.0.0.1", port)):
        assert pods.check_tcp({}, f"127.0.0.1:{port}", 1) is None


def test_a_service_that_finds_nobody_or_no_port_is_listed_as_kubectl_does(
    say: Say, kubectl: Kubectl
) -> None:
    assert kubectl.rehearsal
    say("apply --kustomize kube-config/ping")
    say("rollout status deployment/ping")
    (service,) = [each for each in run_kustomize(KUBE / "ping") if each["kind"] == "Service"]
    url = kubectl.reach("ping", 80, 0)
    wrong: dict[str, dict[str, Any]] = {
        "SELECTS-NOBODY": {"selector": {"a": "b"}},
        "NO-SUCH-PORT": {"ports": [{"port": 80, "targetPort": "web"}]},
    }
    for how, change in wrong.items():
        kubectl.rehearsal.apply([{**service, "spec": {**service["spec"], **change}}])
        eventually(lambda: not is_answered(url), "nobody answers")
        told = recorded(f"get endpointslices {how}")[0].replace("gateway-5dvxx", "ping")
        assert cells(say("get endpointslices"))[1][:4] == cells(told)[1][:4]
    say("apply --kustomize kube-config/ping")
    eventually(lambda: is_answered(url), "it is answered again")


def is_answered(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=30).text == "PONG\n"
    except requests.RequestException:
        return False


PORT = '{"spec": {"ports": [{"port": 80, "targetPort": 9697}]}}'


def test_objects_are_changed_by_kubectl_itself(say: Say, kubectl: Kubectl) -> None:
    say("apply --kustomize kube-config/base")
    before = kubectl.object("deployment", "model-server")
    say("set env deployment/gateway SIGNATURE_NAME=a")
    say("set resources deployment/gateway --requests=cpu=7m")
    for change in (
        "set env deployment/gateway SIGNATURE_NAME-",
        "set resources deployment/gateway --requests=cpu=100m",
        "set image deployment/gateway nobody=a:1",
        "patch service gateway --patch {}",
    ):
        assert [say(change, check=False)] == recorded(change)
    again = "set resources deployment/gateway --requests=cpu=100m"
    assert say(again) == "", "kubectl says nothing where nothing changes"
    assert [say(f"patch service gateway --patch '{PORT}'")] == recorded(
        "patch service gateway --patch PORT"
    )
    assert kubectl.object("service", "gateway")["spec"]["ports"] == [
        {"name": "http", "port": 80, "targetPort": 9697}
    ]
    assert "targetPort: 9697" in say("get service gateway --output yaml")
    say("set image deployment/model-server model-server=clothing-model:002")
    after = kubectl.object("deployment", "model-server")
    image = after["spec"]["template"]["spec"]["containers"][0].pop("image")
    assert image == "clothing-model:002"
    del before["spec"]["template"]["spec"]["containers"][0]["image"]
    assert after == before, "kubectl's defaults were left in"


def test_a_container_that_is_not_there_runs_no_command(say: Say, kubectl: Kubectl) -> None:
    say("apply --kustomize kube-config/base")
    eventually(lambda: kubectl.pods("gateway"), "there is a pod without an image")
    command = "exec deployment/gateway -- id"
    assert [say(command, check=False)] == recorded(command)
    assert say(f"logs {kubectl.pods('gateway')[0].name}") == ""


@pytest.mark.parametrize("kinds", ["pods", "services", "deployments", "endpointslices", "hpa"])
def test_tables_are_laid_out_as_kubectl_lays_them_out(kinds: str) -> None:
    (table,) = recorded(f"get {kinds}")
    assert aligned([re.split(" {2,}", line) for line in table.splitlines()], gap=3) == table


def test_events_are_laid_out_as_kubectl_lays_them_out() -> None:
    (told,) = recorded("describe pod ping-7f56f8558f-d5v4t")
    events = told.partition("Events:\n")[2]
    table = [re.split(" {2,}", line.strip()) for line in events.splitlines()]
    assert aligned(table, gap=2, indent="  ") == events


@pytest.mark.parametrize(
    "command",
    [
        *("describe pod nobody", "delete pod nobody"),
        *("exec nobody -- id", "rollout status deployment/nobody"),
        "autoscale deployment/nobody --cpu=20% --min=1 --max=3",
        *("scale deployment/nobody --replicas 2", "patch deployment/nobody --patch {}"),
        *(f"get {kind} nobody --output yaml" for kind in ("networkpolicy", "service")),
    ],
)
def test_what_is_not_there_is_not_found(command: str, say: Say, kubectl: Kubectl) -> None:
    assert [say(command, check=False)] == recorded(command)
    with pytest.raises(RuntimeError, match=re.escape(f"This failed, see above: kubectl {command}")):
        kubectl(command)


@pytest.mark.parametrize("command", ["exec", "rollout undo", "set image", "rollout status"])
def test_a_deployment_that_is_not_there_is_not_found(command: str, say: Say) -> None:
    told = say(f"{command} deployment/nobody{' a=b' * (command == 'set image')}", check=False)
    assert told == 'Error from server (NotFound): deployments.apps "nobody" not found'


def test_a_deployment_without_pods_runs_no_command(say: Say) -> None:
    say("apply --kustomize kube-config/ping")
    say("rollout status deployment/ping")
    say("scale deployment/ping --replicas 0")
    say("rollout status deployment/ping")
    told = say("exec deployment/ping -- id", check=False)
    assert told == "error: timed out waiting for the condition"


@pytest.mark.parametrize(
    "command",
    [
        *(
            "get",
            "get all",
            "get nodes",
            "autoscale deployment/ping --max=3",
            "get svc",
            "get pods --watch",
            "get pods ping",
        ),
        *("describe service ping", "top pods", "logs ping --follow", "logs deployment/ping"),
        *("apply --filename x.yaml", "delete deployment ping", "rollout restart deployment/ping"),
    ],
)
def test_what_a_rehearsal_does_not_know_is_refused_in_a_sentence(
    command: str, kubectl: Kubectl
) -> None:
    """Also where a command may fail."""
    with pytest.raises(
        NotImplementedError, match=rf"^A rehearsal does not know: kubectl {command}$"
    ):
        kubectl(command, check=False)


def test_a_command_runs_inside_and_its_failure_is_told(say: Say, kubectl: Kubectl) -> None:
    say("apply --kustomize kube-config/ping")
    say("rollout status deployment/ping --timeout 60s")
    assert say("exec deployment/ping -- sh -c 'echo in $REHEARSAL'").startswith("in ")
    told = say("exec deployment/ping -- sh -c 'echo so; exit 3'", check=False)
    assert told == "so\nerror: command terminated with exit code 3"
    log = say(f"logs {kubectl.pods('ping')[0].name}")
    assert "Starting gunicorn" in log
    last = say(f"logs {kubectl.pods('ping')[0].name} --tail 2")
    assert len(last.splitlines()) == 2 and last in log


def test_words_are_read_as_kubectl_reads_them() -> None:
    assert words_of("scale deployment/ping --replicas=3") == (
        ["scale", "deployment", "ping", "--replicas", "3"],
        [],
    )
    assert words_of("exec a -- sh -c 'b --c=d'") == (["exec", "a"], ["sh", "-c", "b --c=d"])
    assert words_of("get a,b c/d --e f/g=h")[0] == ["get", "a,b", "c/d", "--e", "f/g=h"]


# --- Cells that are run again ---------------------------------------------------------------------


def test_another_kubectl_takes_the_place_of_the_one_before(kubectl: Kubectl) -> None:
    kubectl("apply --kustomize kube-config/ping")
    kubectl("rollout status deployment/ping")
    port = free_port()
    kubectl.forward("service/ping", 80, port)
    again = Kubectl(EMBEDDED, "ping")
    try:
        assert kubectl.rehearsal and again.rehearsal and again.again and not kubectl.again
        assert not kubectl.rehearsal.folder.exists() and not kubectl.rehearsal.pods()
        assert again.pods("ping") == [] and not servers.is_busy(port)
    finally:
        again.close()
        again.close()  # as a cell of cleaning up that is run twice does


def test_a_client_that_starts_again_replaces_the_one_before(
    kubectl: Kubectl, tmp_path: Path
) -> None:
    kubectl("apply --kustomize kube-config/ping")
    kubectl("rollout status deployment/ping")
    assert kubectl.rehearsal
    service = yaml.safe_load((KUBE / "ping/ping-service.yaml").read_text())
    service["metadata"]["name"] = "gateway"
    kubectl.rehearsal.apply([service])
    (tmp_path / "client.py").write_text(
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    os.write(1, b'0 last words\\n')\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "while True:\n"
        "    print(time.time(), 'version 1 of', sys.argv[1], flush=True)\n"
        "    time.sleep(0.01)\n"
    )
    client = Client(kubectl, str(tmp_path), tmp_path / "notes")
    before = servers.running["client"]
    client = Client(kubectl, str(tmp_path), tmp_path / "notes")
    assert before.poll() is not None and servers.running["client"].poll() is None
    assert client.answers()[0][1].startswith("version 1 of http://localhost:")
    assert "last words" not in client.notes.read_text(), "the one before has written into them"
    client.close()
    assert "client" not in servers.running


def test_waiting_shows_a_clock_and_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    moments = iter([False, False, True])
    servers.wait_until(lambda: next(moments), "the third time")
    assert re.search(r"until the third time: 00:0\d", capsys.readouterr().out)
    with pytest.raises(TimeoutError, match=r"^It took more than 0 s until never\.$"):
        servers.wait_until(lambda: False, "never", 0)
