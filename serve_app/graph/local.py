"""A Ray instance of our own with the graph running on it: for the command line, and for tests."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serve_app.config.serve_file import ServeConfig
from serve_app.models.checkpoint import check_sources
from serve_app.request.errors import ConfigurationError


@dataclass(frozen=True)
class Running:
    """A graph that is up."""

    handle: Any  # ray.serve.handle.DeploymentHandle of the ingress
    url: str | None  # of its HTTP, where it was started here
    ray_address: str  # for `ray.init` in other processes


@contextmanager
def running(
    config: ServeConfig,
    *,
    http: bool = True,
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
) -> Iterator[Running]:
    """Runs the graph until the block ends, with HTTP or for its handle alone.

    Starts a Ray instance on this machine, or joins the one at `address`, whose HTTP stays as it is. It never
    attaches to whatever cluster happens to run here, as a bare `ray.init()` would. Checks come before
    anything is started; a deployment that fails is one line in a `ConfigurationError`.
    """
    if config.only_by_ray:
        raise ConfigurationError(f"{config.only_by_ray[0]}: not supported here; `serve run` and KubeRay take it")
    if address is not None and (host is not None or port is not None):
        raise ConfigurationError("a host and a port are for a Ray of our own, not for the one at an address")
    check_sources(config.app)
    options = dict(config.http_options)
    options["host"] = host or options.get("host", "127.0.0.1")
    options["port"] = options.get("port", 8000) if port is None else port
    own = address is None
    http = http and config.proxy_location != "Disabled"
    if http and own:
        _check_port_free(options["host"], options["port"])
    if own:
        # Ray turns token authentication on for local clusters, and then its own tools lack the token.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # What does not answer health checks does not drain either, and holds its share of a GPU meanwhile.
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")

    import ray
    from ray import serve

    from serve_app.config.settings import APP_NAME
    from serve_app.graph.build import build_graph

    start: dict[str, Any] = {"address": "local", "include_dashboard": False} if own else {"address": address}
    ray.init(**start, log_to_driver=False, logging_level="ERROR", namespace="serve")
    try:
        if http:
            serve.start(proxy_location=config.proxy_location, http_options=options)
        else:
            serve.start(proxy_location="Disabled")
        try:
            handle = serve.run(
                build_graph(config.app, config.deployments),
                name=APP_NAME,
                route_prefix=config.route_prefix,
                logging_config=config.logging_config,
            )
        except RuntimeError as error:
            raise ConfigurationError(_reason(str(error))) from None
        url = None
        if http and own and config.route_prefix is not None:
            url = f"http://{options['host']}:{options['port']}{config.route_prefix.rstrip('/')}"
        yield Running(handle, url, ray.get_runtime_context().gcs_address)
    finally:
        if not own:
            serve.delete(APP_NAME)  # the cluster and what else it serves are not ours
        ray.shutdown()  # a Ray of our own ends with it, replicas and all


def _check_port_free(host: str, port: int) -> None:
    if not 0 < port < 2**16:
        raise ConfigurationError(f"port {port} on {host}: there is no such port")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ConfigurationError(f"port {port} on {host}: {error.strerror}") from None


def _reason(message: str) -> str:
    """The one line that matters of Ray's report of a failed deployment."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := re.match(r"(?:[\w.]+\.)?ConfigurationError: (.+)", line):
            return match.group(1)
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b.*", line)]
    return (errors or lines or ["the deployment failed"])[-1]
