"""An application on its way up: what Serve says of it meanwhile, and why it failed, in a line each.

Serve's own word on a failed application names the deployments alone; what a replica raised stands in the status of its
deployment, at the end of a traceback.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.request.errors import ConfigurationError

_POLL_S = 0.25
_WRONG_CONFIGURATION = re.compile(r"(?:[\w.]+\.)?ConfigurationError: (.+)")
_ERROR = re.compile(r"[\w.]+(?:Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Fault:
    """What a replica said as it failed."""

    reason: str
    final: bool  # a wrong configuration: another try ends alike


def fault_in(message: str) -> Fault | None:
    """The fault in a deployment's message; None where there is none.

    A message without "Error:" is Serve's own, of replicas that wait for a place or take long to start.
    """
    _, found, report = message.partition("Error:\n")
    if not found:
        return None
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := _WRONG_CONFIGURATION.match(line):
            return Fault(match.group(1), final=True)
    errors = [line for line in lines if _ERROR.match(line)]
    return Fault((errors or lines or ["no reason was given"])[-1], final=False)


def one_line(message: str) -> str:
    """A message of Serve's without its line breaks."""
    return " ".join(message.split())


def last_line(error: Exception) -> str:
    """Of what Ray says at length: its causes come last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class Rollout:
    """Follows the status of an application.

    Args:
        tell: shows a line; each message once, until it changes.
        log: where the whole report of a failed replica is.
    """

    def __init__(self, tell: Callable[[str], None], log: str) -> None:
        self._tell = tell
        self._log = log
        self._told: dict[str, str] = {}
        self._seen = False

    def running(self, application: Any) -> bool:
        """Whether all of it is up.

        `application`: its `ray.serve.schema.ApplicationStatusOverview`, or None where Serve has none. Raises
        `ConfigurationError` where it has failed or can't come up, or was deleted after it was there.
        """
        if application is None or application.status == "DELETING":
            if self._seen:
                raise ConfigurationError("the application was deleted while it started")
            return False
        self._seen = True
        faults: Mapping[str, Fault | None] = {
            name: fault_in(deployment.message or "") for name, deployment in application.deployments.items()
        }
        failed = application.status == "DEPLOY_FAILED"
        for name, fault in sorted(faults.items()):
            if fault is not None and (fault.final or failed):
                # What is found in a configuration names its own place.
                where = "" if fault.final else f"; log: {self._log}"
                raise ConfigurationError(f"{name}: {fault.reason}{where}")
        if failed:
            raise ConfigurationError(one_line(application.message) or "the deployment failed")
        if application.status == "RUNNING":
            return True
        for name, deployment in application.deployments.items():
            said = one_line(deployment.message or "")
            if fault := faults[name]:
                said = f"a replica failed and is tried again: {fault.reason}"
            self.say(name, said)
        return False

    def say(self, about: str, message: str) -> None:
        """Shows a message unless it is the last that was shown on the same."""
        if message and self._told.get(about) != message:
            self._tell(f"{about}: {message}")
        self._told[about] = message

    def say_once(self, about: str, message: str) -> None:
        """Shows the first message of its kind."""
        if about not in self._told:
            self.say(about, message)


def wait_until_running(name: str, rollout: Rollout, meanwhile: Callable[[], None]) -> None:
    """Returns when the application is up. Raises `ConfigurationError`, in one line, where it fails."""
    from ray import serve

    while not rollout.running(serve.status().applications.get(name)):
        meanwhile()
        time.sleep(_POLL_S)
