"""What listens after the graph is up: nothing on an outside address that answers without the token."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc
import httpx
import pytest
from ray.serve.generated.serve_pb2 import DESCRIPTOR

from serve_app.graph.environment import TOKEN_PATH
from serve_app.graph.local import Running
from tests.graph.listeners import Listener, listeners_of, outside_address

# All that a replica's server offers, and some that other servers of Ray's do.
_OFFERED = [f"/ray.serve.ASGIService/{method.name}" for method in DESCRIPTOR.services_by_name["ASGIService"].methods]
_OTHERS = (
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.ReporterService/GetTraceback",
)
_REFUSED = grpc.StatusCode.UNAUTHENTICATED

JOB_API_PORT = 52365  # Ray's own, of the dashboard agent


def call(address: str, method: str, token: str | None = None) -> grpc.StatusCode:
    """The status of a call with an empty message."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def listeners(graph: Running) -> list[Listener]:
    found = listeners_of(os.getpid())
    # The proxy, the replicas of five deployments, GCS, raylet and agents: a reading that misses them proves nothing.
    assert graph.url is not None
    assert int(graph.url.rpartition(":")[2]) in {one.port for one in found}
    assert len({one.pid for one in found if "ServeReplica:sdxl" in one.process}) >= 5
    assert any("gcs_server" in one.process for one in found) and any("raylet" in one.process for one in found)
    return found


def test_only_replicas_listen_outside_of_loopback(listeners: list[Listener]) -> None:
    """Each has one such port, for calls between deployments, which Ray binds to every address."""
    outside = [one for one in listeners if one.outside]
    assert all("ServeReplica" in one.process for one in outside), outside
    assert len(outside) == len({one.pid for one in outside}), outside


def test_they_answer_nobody_without_the_token(listeners: list[Listener]) -> None:
    token = Path(os.environ[TOKEN_PATH]).read_text()
    host = outside_address() or "127.0.0.1"
    outside = [one for one in listeners if one.outside]
    assert len(_OFFERED) >= 3 and outside
    for one in outside:
        address = f"{host}:{one.port}"
        for method in _OFFERED:
            assert call(address, method) is _REFUSED, (one, method)
            assert call(address, method, "0" * 64) is _REFUSED, (one, method)
        for method in _OTHERS:
            assert call(address, method) in (_REFUSED, grpc.StatusCode.UNIMPLEMENTED), (one, method)
        # It is the token that decides: with it the empty message is read, and found wrong.
        assert call(address, "/ray.serve.ASGIService/HandleRequest", token) is grpc.StatusCode.UNKNOWN
        with pytest.raises(httpx.HTTPError):  # no HTTP/1 either
            httpx.get(f"http://{address}/api/version", timeout=20, trust_env=False)


def test_the_job_api_wants_the_token_even_here(listeners: list[Listener]) -> None:
    """It runs a shell command a job."""
    agents = [one for one in listeners if "DashboardAgent" in one.process]
    assert agents and not any(one.outside for one in agents)
    answers = []
    for one in agents:
        try:
            answer = httpx.post(
                f"http://127.0.0.1:{one.port}/api/job_agent/jobs/",
                json={"entrypoint": "true"},
                timeout=20,
                trust_env=False,
            )
            answers.append(answer.status_code)
        except httpx.RemoteProtocolError:
            pass  # gRPC
    assert answers and not any(status < 400 for status in answers)
    # Of several Rays on a machine only one has the agent's fixed port.
    assert 401 in answers or not any(one.port == JOB_API_PORT for one in agents)


def test_nothing_answers_at_the_outside_address(listeners: list[Listener]) -> None:
    host = outside_address()
    if host is None:
        pytest.skip("this machine has no address but loopback")
    open_ports = set()
    for one in listeners:
        with socket.socket() as probe:
            probe.settimeout(10)
            if probe.connect_ex((host, one.port)) == 0:
                open_ports.add(one.port)
    assert open_ports == {one.port for one in listeners if one.outside}
