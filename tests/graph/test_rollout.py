"""What is said of an application on its way up, by what Serve says of it."""

from __future__ import annotations

import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from serve_app.graph.rollout import Fault, Rollout, fault_in
from serve_app.request.errors import ConfigurationError

# As Ray 2.60 words them.
RETRIED = """A replica failed to start with exception. Retrying 2 more time(s). Error:
\x1b[36mray::ServeReplica:sdxl:VaeDecoder.initialize_and_get_metadata()\x1b[39m (pid=7, ip=127.0.0.1, actor_id=b)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^
RuntimeError: Traceback (most recent call last):
  File "/x/ray/serve/_private/replica.py", line 1400, in initialize
    await self._user_callable_asgi_app
  File "/x/serve_app/models/decode.py", line 40, in __init__
    self._vae = load(checkpoint)
{last}
"""
SLOW = "Deployment 'VaeDecoder' in application 'sdxl' has 1 replicas that have taken more than 30s to be scheduled."


def message(last: str) -> str:
    return RETRIED.replace("{last}", last)


def application(
    vae: str, status: ApplicationStatus = ApplicationStatus.DEPLOYING, said: str = ""
) -> ApplicationStatusOverview:
    def deployment(text: str) -> DeploymentStatusOverview:
        trigger = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
        return DeploymentStatusOverview(DeploymentStatus.UPDATING, trigger, {}, text)

    deployments = {"TextEncoder": deployment(""), "VaeDecoder": deployment(vae)}
    return ApplicationStatusOverview(status, said, 0.0, deployments)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", None),
        (SLOW, None),
        (message("serve_app.request.errors.ConfigurationError: /x: no such folder"), Fault("/x: no such folder", True)),
        (message("ConfigurationError: no num_gpus"), Fault("no num_gpus", True)),
        (message("ValueError: Cannot load"), Fault("ValueError: Cannot load", False)),
        (message("torch.OutOfMemoryError: CUDA"), Fault("torch.OutOfMemoryError: CUDA", False)),
        ("A replica failed to start with exception. Error:\nThe actor died.", Fault("The actor died.", False)),
        ("A replica failed to start with exception. Error:\n", Fault("no reason was given", False)),
    ],
)  # fmt: skip
def test_the_reason_in_a_message(text: str, fault: Fault | None) -> None:
    assert fault_in(text) == fault


def test_a_wrong_configuration_ends_it_at_the_first_try() -> None:
    rollout = Rollout(lambda line: None, "the log")
    with pytest.raises(ConfigurationError, match=r"^VaeDecoder: /x: no such folder$"):
        rollout.running(application(message("ConfigurationError: /x: no such folder")))


def test_other_faults_are_told_and_end_it_when_serve_gives_up() -> None:
    told: list[str] = []
    rollout = Rollout(told.append, "/logs/controller_*.log")
    failing = message("ValueError: Cannot load")
    assert not rollout.running(application(failing))
    assert not rollout.running(application(failing))
    assert told == ["VaeDecoder: a replica failed and is tried again: ValueError: Cannot load"]
    end = application(failing, ApplicationStatus.DEPLOY_FAILED, "Failed to update the deployments ['VaeDecoder'].")
    with pytest.raises(
        ConfigurationError, match=r"^VaeDecoder: ValueError: Cannot load; log: /logs/controller_\*\.log$"
    ):
        rollout.running(end)


def test_without_a_replica_s_word_serve_s_own_is_the_reason() -> None:
    with pytest.raises(ConfigurationError, match=r"^Could not build the app: no module$"):
        Rollout(lambda line: None, "").running(
            application("", ApplicationStatus.DEPLOY_FAILED, "Could not build\n the app: no module")
        )


def test_serve_s_messages_are_passed_on_as_they_change() -> None:
    told: list[str] = []
    rollout = Rollout(told.append, "")
    assert not rollout.running(None)
    for text in ("", SLOW, SLOW, "", SLOW.replace("1 replicas", "2\nreplicas")):
        assert not rollout.running(application(text))
    assert told == [f"VaeDecoder: {SLOW}", f"VaeDecoder: {SLOW.replace('1 replicas', '2 replicas')}"]
    assert rollout.running(application("", ApplicationStatus.RUNNING))


@pytest.mark.parametrize("gone", [None, application("", ApplicationStatus.DELETING)])
def test_an_application_that_goes_meanwhile_ends_it(gone: ApplicationStatusOverview | None) -> None:
    rollout = Rollout(lambda line: None, "")
    assert not rollout.running(gone), "one of before may be on its way out"
    assert not rollout.running(application(""))
    with pytest.raises(ConfigurationError, match=r"^the application was deleted while it started$"):
        rollout.running(gone)
