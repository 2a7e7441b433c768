"""Reading a Ray Serve config file as strictly as our own settings.

Ray ignores unknown keys in these files without a word; here they are errors that name the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from serve_app.config import AppConfig, check_max_ongoing_requests, parse_config
from serve_app.errors import ConfigurationError
from serve_app.graph import APP_NAME, DEPLOYMENTS


@dataclass(frozen=True)
class ServeConfig:
    """A config file, checked: our settings, the options of each deployment, and HTTP's."""

    app: AppConfig
    deployments: dict[str, dict[str, Any]]  # deployment name -> options
    http_options: dict[str, Any]
    proxy_location: str


def read_serve_config(path: Path) -> ServeConfig:
    """Reads a config file. Raises `ConfigurationError`, one line that says what and where."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return check_serve_config(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def check_serve_config(content: Any) -> ServeConfig:
    """Checks a config file's content."""
    if not isinstance(content, dict):
        raise ConfigurationError("not a Ray Serve config: no keys at the top")
    _no_unknown_keys(content, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ConfigurationError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    applications = content["applications"]
    if len(applications) != 1:
        raise ConfigurationError(f"applications: {len(applications)} given, one is served")
    (application,) = applications
    _no_unknown_keys(application, ServeApplicationSchema, "applications.0.")
    if application.get("name") != APP_NAME:
        raise ConfigurationError(f"applications.0.name: {application.get('name')!r}, must be {APP_NAME!r}")
    app = parse_config(application.get("args") or {})
    return ServeConfig(
        app=app,
        deployments={
            options["name"]: _deployment(options, app, f"applications.0.deployments.{position}.")
            for position, options in enumerate(application.get("deployments") or [])
        },
        http_options=dict(content.get("http_options") or {}),
        proxy_location=str(content.get("proxy_location") or "EveryNode"),
    )


def _deployment(options: dict[str, Any], app: AppConfig, where: str) -> dict[str, Any]:
    _no_unknown_keys(options, DeploymentSchema, where)
    _no_unknown_keys(options.get("ray_actor_options") or {}, RayActorOptionsSchema, f"{where}ray_actor_options.")
    if options["name"] not in DEPLOYMENTS:
        raise ConfigurationError(f"{where}name: {options['name']!r} is none of {', '.join(DEPLOYMENTS)}")
    if "max_ongoing_requests" in options:
        try:
            check_max_ongoing_requests(app, options["max_ongoing_requests"], f"{where}max_ongoing_requests")
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    return dict(options)


def _no_unknown_keys(given: dict[str, Any], schema: type[BaseModel], where: str) -> None:
    known = {*schema.model_fields, *(info.alias for info in schema.model_fields.values() if info.alias)}
    for key in given:
        if key not in known:
            raise ConfigurationError(f"{where}{key}: unknown key")
