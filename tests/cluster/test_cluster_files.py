"""The cluster files: in Ray's own eyes, in a made-up AWS account, and against the fields that KubeRay documents."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path

import boto3
import jsonschema
import pytest
import ray
import yaml
from autoscaler import config_of_ray_cluster, node_provider
from here import ROOT
from ray.autoscaler.sdk import bootstrap_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from jobs import search

pytest_plugins = ["s3"]

LAUNCHED = ["ray_cluster.yaml", "cluster/local.yaml"]
RAYJOB = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def schema():
    """What Ray takes for a cluster file."""
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_file(name):
    jsonschema.validate(read(name), schema())


def test_ray_fills_in_the_file_of_machines_that_are_there():
    types = bootstrap_config(read("cluster/local.yaml"), no_config_cache=True)["available_node_types"]
    assert list(types) == ["local.cluster.node"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_installed_is_there_and_is_all_that_the_installation_needs(name):
    mounts = read(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / source).exists() for source in mounts.values())
    assert {target.removeprefix("~/patchrank/source/") for target in mounts} == set(mounts.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {package.rstrip("*") for package in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed |= {"pyproject.toml", "constraints.txt", "LICENSE", project["project"]["readme"]}
    assert set(mounts.values()) == needed


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_the_token_and_its_dashboard_stays_on_loopback(name):
    config = read(name)
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert not any("0.0.0.0" in command or "RAY_AUTH_MODE" in command for command in commands)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]


def test_an_aws_account_gets_spot_machines_with_gpus(s3_endpoint, tmp_path, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(tmp_path),  # a new ssh key goes there
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    boto3.client("iam").create_instance_profile(InstanceProfileName="patchrank")
    config = read("ray_cluster.yaml")
    for node in config["available_node_types"].values():
        node["node_config"]["ImageId"] = image
    config = bootstrap_config(config, no_config_cache=True)
    types = config["available_node_types"]
    assert types["gpu_spot"]["resources"]["GPU"] == 1 and types["head"]["resources"] == {"CPU": 0}

    provider = node_provider(config["provider"], config["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "gpu_spot"}
    provider.create_node(types["gpu_spot"]["node_config"], tags, 1)
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    (machine,) = [machine for reservation in reservations for machine in reservation["Instances"]]
    assert machine["InstanceLifecycle"] == "spot" and machine["InstanceType"] == "g6.xlarge"
    assert machine["IamInstanceProfile"]["Arn"].endswith("/patchrank")
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    (group,) = (group for group in groups if group["GroupName"].startswith("ray-autoscaler"))
    open_to_all = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: tuple[str, ...] = (), **properties: object) -> dict[str, object]:
    """The JSON schema of an object that has no other fields."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
CONTAINER = fields(("name", "image"), name=TEXT, image=TEXT, resources=fields(requests=TEXTS, limits=TEXTS))
POD = fields(
    ("spec",),
    spec=fields(("containers",), serviceAccountName=TEXT, containers={"type": "array", "items": CONTAINER}),
)
# The fields of ray.io/v1 as KubeRay's API reference lists them (1.6), of which a pod template has those used here.
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=fields(("template",), rayStartParams=TEXTS, serviceType=TEXT, enableIngress=FLAG, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
RAYJOB_SCHEMA = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name=TEXT, namespace=TEXT, labels=TEXTS),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        suspend=FLAG,
        rayClusterSpec=CLUSTER,
    ),
)


def test_the_rayjob_has_only_fields_that_kuberay_documents():
    jsonschema.validate(RAYJOB, RAYJOB_SCHEMA)
    spec = RAYJOB["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert spec["rayVersion"] == pinned["ray"]


def test_rays_autoscaler_on_kubernetes_reads_gpus_and_limits_out_of_the_rayjob():
    cluster = {"metadata": {"name": "patchrank", "namespace": "default"}, "spec": RAYJOB["spec"]["rayClusterSpec"]}
    config = config_of_ray_cluster(cluster)
    jsonschema.validate(config, schema())
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    gpu = types["gpu"]
    assert (gpu["resources"]["GPU"], gpu["min_workers"], gpu["max_workers"]) == (1, 0, 8)
    assert config["idle_timeout_minutes"] == 5


def test_the_rayjobs_command_is_one_that_the_search_understands():
    python, script, *flags = shlex.split(RAYJOB["spec"]["entrypoint"])
    assert (python, script) == ("python", "/patchrank/jobs/search.py")
    job = search.job(search.parser().parse_args(flags))
    (group,) = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (job.machines.actors, job.machines.gpus_per_actor) == (group["maxReplicas"], 1)
