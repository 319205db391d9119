"""A tensor-parallel engine through vLLM's Ray executor: its workers are actors beside the replica.

vLLM's CPU platform names no resource of Ray's, so a platform plugin says that it has GPUs, and Ray
is told that this machine has three. The workers compute on the CPU; placement group, actors, their
environment and the way of a step are those of GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="no Ray: make test-deploy")

from deploy.ray.cluster import request_body
from tests.deploy.on_ray import started
from tests.support.server import Server, wait_until

NUM_WORKERS = 3  # SmolLM2 has three KV heads

FINDER = """
def find():
    return "pretended_gpus.Platform"
"""

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class Platform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id):
        return int(device_id)
"""

ACTORS = """
import json, ray
from ray.util.state import list_actors

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
alive = list_actors(filters=[("state", "=", "ALIVE")])
print(json.dumps([actor.class_name for actor in alive]))
"""


def pretend_gpus(folder: Path) -> dict[str, str]:
    """Install the platform into a folder; return what makes every process find it."""
    about = folder / "pretended_gpus-1.dist-info"
    about.mkdir(parents=True)
    (folder / "find_pretended_gpus.py").write_text(FINDER)
    (folder / "pretended_gpus.py").write_text(PLATFORM)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pretended-gpus\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\npretended_gpus = find_pretended_gpus:find\n"
    )
    return {
        "PYTHONPATH": str(folder),
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 8, "GPU": NUM_WORKERS}),
    }


def living_workers() -> int:
    """Return how many worker actors the cluster on this machine has."""
    done = subprocess.run(
        [sys.executable, "-c", ACTORS], capture_output=True, text=True, check=True, timeout=60
    )
    return int(json.loads(done.stdout.splitlines()[-1]).count("RayWorkerProc"))


def test_branches_over_workers_of_ray(model: Path, tmp_path: Path) -> None:
    """The answer is that of a server of its own; metrics are there, and nothing is held."""
    body = request_body("How do I stay healthy?")
    server = Server(model, tmp_path / "plain.log", {"profile": "skeleton"})
    try:
        server.wait_ready()
        expected = server.post("/v1/chat/completions", **{**body, "model": "smollm2"}).json()
    finally:
        server.stop()
    options = {"distributed_executor_backend": "ray", "tensor_parallel_size": NUM_WORKERS}
    with started(
        model,
        tmp_path,
        changes=pretend_gpus(tmp_path / "platform"),
        options=options,
        num_replicas=1,
    ) as cluster:
        assert living_workers() == NUM_WORKERS
        answer = httpx.post(
            f"{cluster.url}/v1/chat/completions", json=body, timeout=300, trust_env=False
        ).json()
        (pid,) = cluster.replicas()
        wait_until(lambda: cluster.metric(pid, "vllm_pt_held_blocks") == 0, "nothing is held")
        assert cluster.metric(pid, "vllm_pt_forks_total") == 1
    for name in ("content", "role"):
        assert answer["choices"][0]["message"][name] == expected["choices"][0]["message"][name]
    summaries = [each["kv_transfer_params"]["parallel_think"] for each in (answer, expected)]
    assert summaries[0]["forks"] == summaries[1]["forks"] == 1
    assert summaries[0]["widest_fork"] == summaries[1]["widest_fork"]
