"""cluster.yaml and configs/cluster/, read and prepared by the code of Ray that would start the clusters.

Of AWS there is moto's EC2 and IAM, which Ray's own bootstrap talks to; of Kubernetes the code by which
KubeRay's autoscaler reads a RayCluster. No machine and no pod is started.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from s3 import ACCESS_KEY, SECRET_KEY, server_port

ROOT = Path(__file__).parents[1]
PLACES = ["cluster.yaml", "configs/cluster/on-premises.yaml"]


def prepared(path: str) -> dict[str, Any]:
    """The config over Ray's defaults for its provider, as `ray up` reads it. Contacts nobody."""
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / path).read_text()))
    return config


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    return prepared("cluster.yaml")


def node_types(config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head's type, and the workers'."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    return head, list(types.values())


@pytest.mark.parametrize("path", PLACES)
def test_ray_accepts_it(path: str) -> None:
    validate_config(prepared(path))


@pytest.mark.parametrize("path", PLACES)
def test_the_head_does_no_work_and_the_dashboard_is_not_open(path: str) -> None:
    (start,) = [command for command in prepared(path)["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("path", PLACES)
def test_every_node_asks_for_the_token(path: str) -> None:
    config = prepared(path)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token ray start" in start for start in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("path", PLACES)
def test_what_is_copied_to_the_nodes_exists(path: str) -> None:
    for source in prepared(path)["file_mounts"].values():
        assert source.startswith("~") or (ROOT / source).exists(), source


@pytest.mark.parametrize("path", PLACES)
def test_raypipe_is_installed_with_the_extra_that_fits(path: str) -> None:
    config = prepared(path)
    commands = "\n".join(config["head_setup_commands"] + config["worker_setup_commands"])
    assert '-c ~/raypipe/constraints.txt "$HOME/raypipe[$extra]"' in commands
    assert "extra=gpu; else extra=cpu" in commands


def test_workers_come_only_when_there_is_work(aws: dict[str, Any]) -> None:
    head, workers = node_types(aws)
    assert head["resources"] == {"CPU": 0, "GPU": 0} and head["max_workers"] == 0
    assert all(worker["min_workers"] == 0 < worker["max_workers"] for worker in workers)
    assert aws["max_workers"] >= sum(worker["max_workers"] for worker in workers)


def test_there_are_nodes_for_extraction_and_nodes_for_trials(aws: dict[str, Any]) -> None:
    _, workers = node_types(aws)
    (cpu,) = [worker for worker in workers if not worker["resources"].get("GPU")]
    (gpu,) = [worker for worker in workers if worker["resources"].get("GPU")]
    assert cpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["resources"]["GPU"] >= 2


@pytest.mark.parametrize("path", [*PLACES, "configs/cluster/kuberay.yaml"])
def test_machines_share_no_disk(path: str) -> None:
    text = (ROOT / path).read_text()
    assert "s3://BUCKET/features" in text
    assert not [word for word in ("mount ", "nfs4", "volumeMounts", "persistentVolumeClaim") if word in text]


def test_workers_have_a_role_for_the_bucket(aws: dict[str, Any]) -> None:
    _, workers = node_types(aws)
    assert all("instance-profile" in worker["node_config"]["IamInstanceProfile"]["Arn"] for worker in workers)


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """moto in the place of AWS, for every client that boto3 makes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    yield


BOOTSTRAP = """
import sys, time, yaml
time.sleep = lambda seconds: None  # Ray waits for IAM to be everywhere
from ray.autoscaler._private.commands import _bootstrap_config
config = _bootstrap_config(yaml.safe_load(open("cluster.yaml")), no_config_cache=True)
yaml.safe_dump(config, sys.stdout)
"""


def test_ray_bootstraps_it_on_aws(ec2: None) -> None:
    """Role, key, subnets and security group, as `ray up` makes them before it starts the head."""
    import boto3

    run = subprocess.run(
        [sys.executable, "-c", BOOTSTRAP], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr[-3000:]
    config = yaml.safe_load(run.stdout[run.stdout.index("auth:") :])
    head, workers = node_types(config)
    for node in (head, *workers):
        assert node["node_config"]["SubnetIds"] and node["node_config"]["KeyName"]
    assert boto3.client("iam", region_name="us-east-1").list_instance_profiles()["InstanceProfiles"], (
        "the head may start machines"
    )
    client = boto3.client("ec2", region_name=config["provider"]["region"])
    ids = {i for node in (head, *workers) for i in node["node_config"]["SecurityGroupIds"]}
    (group,) = client.describe_security_groups(GroupIds=sorted(ids))["SecurityGroups"]
    open_to_all = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)], "SSH and nothing else"
    rest = [rule for rule in group["IpPermissions"] if not rule["IpRanges"]]
    assert all(pair["GroupId"] in ids for rule in rest for pair in rule["UserIdGroupPairs"])


# --- Kubernetes -------------------------------------------------------------------------------------------

SECRET = "raypipe-token"
JOBS = {
    job["metadata"]["name"]: job
    for job in yaml.safe_load_all((ROOT / "configs/cluster/kuberay.yaml").read_text())
}


@pytest.mark.parametrize("name", ["raypipe-extract", "raypipe-tune"])
def test_kuberays_autoscaler_reads_it(name: str) -> None:
    job = JOBS[name]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    head, (worker,) = node_types(config)
    assert head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    if name == "raypipe-tune":
        assert worker["resources"]["GPU"] >= 2
    else:
        assert "GPU" not in worker["resources"]


def containers(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for child in value.values():
            yield from containers(child)
    elif isinstance(value, list):
        for child in value:
            yield from containers(child)


@pytest.mark.parametrize("name", ["raypipe-extract", "raypipe-tune"])
def test_pods_ask_for_the_token_which_is_a_secret(name: str) -> None:
    """KubeRay's own pods have the token only where KubeRay hands it out, so nothing else does here."""
    cluster = JOBS[name]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": SECRET}
    found = list(containers(JOBS[name]))
    assert len(found) == 2
    for container in found:
        assert not [v for v in container.get("env", []) if v["name"].startswith("RAY_AUTH_")]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_secret_is_made_as_kuberay_reads_it() -> None:
    said = (ROOT / "configs/cluster/kuberay.yaml").read_text()
    assert f"kubectl create secret generic {SECRET} --from-literal=auth_token=" in said
    assert "KubeRay operator 1.6 or later" in said


@pytest.mark.parametrize("name", ["raypipe-extract", "raypipe-tune"])
def test_the_entry_point_is_a_command_with_flags_that_it_has(name: str) -> None:
    from raypipe.config import ExtractConfig, TuneConfig
    from raypipe.reading import load_config

    python, minus_m, module, *flags = JOBS[name]["spec"]["entrypoint"].split()
    kind = {"raypipe.extract": ExtractConfig, "raypipe.tune": TuneConfig}[module]
    assert (python, minus_m) == ("python", "-m")
    load_config(kind, flags, prog=module)  # type: ignore[type-var]
