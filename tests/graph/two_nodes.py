"""Run by test_two_nodes.py in a process of its own: base and refiner on two simulated Ray nodes.

The cluster is somebody's, whose HTTP others reach: our file claims the contrary, and more time than its proxies give.

Usage: python -m tests.graph.two_nodes CHECKPOINT_FOLDER OUTPUT.npz
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import httpx
import numpy as np

from serve_app.graph.environment import set_for_own_ray

set_for_own_ray()  # before the first `import ray`


def main(folder: Path, output: Path) -> None:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.context import _get_global_client

    from serve_app.config.serve_file import ServeConfig
    from serve_app.config.settings import parse_config
    from serve_app.graph.local import running
    from tests.cases import TRAFFIC

    compute = {"device": "cpu", "torch_threads": 1}
    config = parse_config(
        {
            "base": {"path": str(folder / "base")},
            "refiner": {"path": str(folder / "refiner")},
            "http": {"loopback": True, "request_timeout_s": 600},
            **dict.fromkeys(("text_encoder", "base_denoiser", "refiner_denoiser", "vae_decoder"), compute),
        }
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"base_node": 1}})
    cluster.add_node(num_cpus=2, resources={"refiner_node": 1})
    cluster.wait_for_nodes()
    # Each denoiser asks for a resource that one node alone has.
    apart = {
        "BaseDenoiser": {"ray_actor_options": {"num_cpus": 0.1, "resources": {"base_node": 1}}},
        "Refiner": {"ray_actor_options": {"num_cpus": 0.1, "resources": {"refiner_node": 1}}},
    }
    with socket.create_server(("0.0.0.0", 0)) as probe:
        port = probe.getsockname()[1]
    http_options = {"host": "0.0.0.0", "port": port, "request_timeout_s": 300}
    serve_config = ServeConfig(config, apart, http_options, "HeadOnly", "/", {"log_level": "WARNING"})
    told: list[str] = []
    try:
        with running(serve_config, address=cluster.address, tell=told.append) as graph:
            nodes = [
                serve.get_deployment_handle(name, "sdxl").stats.remote().result()["node"]
                for name in ("BaseDenoiser", "Refiner")
            ]
            responses = [graph.handle.generate.remote(request) for request in TRAFFIC[:6]]
            pixels = [np.array(response.result().images[0].to_pil()) for response in responses]
            np.savez(output, *pixels, nodes=np.array(nodes))
            _check_http(f"http://127.0.0.1:{port}")
            ray.kill(_get_global_client()._controller)
        # Without its controller the application can't be deleted: that is said, and the cluster is left all the same.
        assert not ray.is_initialized()
        assert any("the application 'sdxl' may still be there" in line for line in told), told
    finally:
        cluster.shutdown()


def _check_http(url: str) -> None:
    """What is true of the proxies holds, whatever the file says."""
    unnamed = httpx.post(f"{url}/sdapi/v1/interrupt", timeout=120)
    assert unnamed.status_code >= 400, unnamed.text
    for seconds, status in (("301", 400), ("299", 200)):
        answer = httpx.get(f"{url}/v1/sdxl/info", headers={"x-request-timeout-seconds": seconds}, timeout=120)
        assert answer.status_code == status, answer.text


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
