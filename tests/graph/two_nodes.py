"""Run by test_graph_two_nodes.py in a process of its own: base and refiner on two simulated Ray nodes.

Usage: python -m tests.graph.two_nodes CHECKPOINT_FOLDER OUTPUT.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from serve_app.graph.environment import set_for_own_ray

set_for_own_ray()  # before the first `import ray`


def main(folder: Path, output: Path) -> None:
    from ray import serve
    from ray.cluster_utils import Cluster

    from serve_app.config.serve_file import ServeConfig
    from serve_app.config.settings import parse_config
    from serve_app.graph.local import running
    from tests.cases import TRAFFIC

    compute = {"device": "cpu", "torch_threads": 1}
    config = parse_config(
        {
            "base": {"path": str(folder / "base")},
            "refiner": {"path": str(folder / "refiner")},
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
    serve_config = ServeConfig(config, apart, {}, "EveryNode", "/", {"log_level": "WARNING"})
    try:
        with running(serve_config, http=False, address=cluster.address) as graph:
            nodes = [
                serve.get_deployment_handle(name, "sdxl").stats.remote().result()["node"]
                for name in ("BaseDenoiser", "Refiner")
            ]
            responses = [graph.handle.generate.remote(request) for request in TRAFFIC[:6]]
            pixels = [np.array(response.result().images[0].to_pil()) for response in responses]
            np.savez(output, *pixels, nodes=np.array(nodes))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
