"""Reading a Ray Serve config file as strictly as our own settings.

Ray ignores unknown keys in these files without a word; here they are errors that name the key. Ray is imported on use
only: importing this module must leave what Ray reads from the environment still to be set.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from serve_app.config.settings import (
    APP_NAME,
    COMPUTE_OF,
    DEPLOYMENTS,
    AppConfig,
    check_max_ongoing_requests,
    parse_config,
)
from serve_app.request.errors import ConfigurationError, first_fault

IMPORT_PATH = "serve_app.graph:build_app"
_TAKEN = {"proxy_location", "http_options", "logging_config", "applications"}
_TAKEN_OF_APPLICATION = {"name", "route_prefix", "import_path", "args", "deployments", "logging_config"}
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class ServeConfig:
    """A config file, checked: our settings, the options of each deployment, and HTTP's."""

    app: AppConfig
    deployments: dict[str, dict[str, Any]]  # deployment name -> options
    http_options: dict[str, Any]
    proxy_location: str
    route_prefix: str | None  # None: no HTTP
    logging_config: dict[str, Any]
    only_by_ray: tuple[str, ...] = ()  # settings that Ray's own ways of deploying take, `sdxl-serve serve` doesn't


def read_serve_config(path: Path) -> ServeConfig:
    """Reads a config file. Raises `ConfigurationError`, one line that says what and where."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return check_serve_config(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def check_serve_config(content: Any) -> ServeConfig:
    """Checks a config file's content."""
    from ray.serve import Deployment
    from ray.serve.schema import ServeDeploySchema

    taken_of_deployment = inspect.signature(Deployment.options).parameters
    if not isinstance(content, dict):
        raise ConfigurationError("not a Ray Serve config: no keys at the top")
    for key in unknown_keys(content, ServeDeploySchema):
        raise ConfigurationError(f"{key}: unknown key")
    try:
        ServeDeploySchema.model_validate(content)
    except ValidationError as error:
        place, reason = first_fault(error)
        raise ConfigurationError(f"{'.'.join(map(str, place))}: {reason}") from None
    applications = content["applications"]
    if len(applications) != 1:
        raise ConfigurationError(f"applications: {len(applications)} given, one is served")
    (application,) = applications
    if application.get("import_path") != IMPORT_PATH:
        raise ConfigurationError(f"applications.0.import_path: {application.get('import_path')!r}, not {IMPORT_PATH}")
    if application.get("name") != APP_NAME:
        raise ConfigurationError(f"applications.0.name: {application.get('name')!r}, must be {APP_NAME!r}")
    app = parse_config(application.get("args") or {})
    http_options = dict(content.get("http_options") or {})
    _check_request_timeout(http_options, app)
    deployments = application.get("deployments") or []
    _check_deployments(deployments, app)
    return ServeConfig(
        app=app,
        deployments={options["name"]: dict(options) for options in deployments},
        http_options=http_options,
        proxy_location=str(content.get("proxy_location") or "EveryNode"),
        route_prefix=application.get("route_prefix", "/"),
        logging_config=application.get("logging_config") or content.get("logging_config") or _QUIET,
        only_by_ray=(
            *(key for key in content if key not in _TAKEN),
            *(f"applications.0.{key}" for key in application if key not in _TAKEN_OF_APPLICATION),
            *(
                f"applications.0.deployments.{position}.{key}"
                for position, options in enumerate(deployments)
                for key in options
                if key not in taken_of_deployment
            ),
        ),
    )


def _check_request_timeout(http_options: dict[str, Any], app: AppConfig) -> None:
    """What clients may ask for must be what Ray's proxy gives: of two, the ingress would take the smaller."""
    given = http_options.get("request_timeout_s")
    if given is not None and given != app.http.request_timeout_s:
        raise ConfigurationError(
            f"http_options.request_timeout_s is {given:g}, args.http.request_timeout_s {app.http.request_timeout_s:g}: "
            "they must be equal"
        )


def _check_deployments(deployments: list[dict[str, Any]], app: AppConfig) -> None:
    ingress_replicas = 1
    for options in deployments:
        if options["name"] == "Ingress":
            ingress_replicas = _most_replicas(options)
    seen = set()
    for position, options in enumerate(deployments):
        name, where = options["name"], f"applications.0.deployments.{position}"
        if name not in DEPLOYMENTS:
            raise ConfigurationError(f"{where}.name: {name!r} is none of {', '.join(DEPLOYMENTS)}")
        if name == "Refiner" and app.refiner is None:
            raise ConfigurationError(f"{where}.name: Refiner, but args.refiner is absent")
        if name in seen:
            raise ConfigurationError(f"{where}.name: {name} is given twice")
        seen.add(name)
        if "max_ongoing_requests" in options:
            _check_ongoing(app, options["max_ongoing_requests"], f"{where}.max_ongoing_requests", ingress_replicas)
    _check_devices(deployments, app)
    _check_ongoing(app, app.max_ongoing_requests, "args.max_ongoing_requests", ingress_replicas)


def _check_devices(deployments: list[dict[str, Any]], app: AppConfig) -> None:
    """Ray hides no GPU from a replica that booked none: it would compute unbooked and without a bound."""
    booked = {options["name"]: (options.get("ray_actor_options") or {}).get("num_gpus") for options in deployments}
    for stage, deployment in COMPUTE_OF.items():
        if deployment == "Refiner" and app.refiner is None:
            continue
        if getattr(app, stage).device == "cuda" and not booked.get(deployment):
            raise ConfigurationError(
                f"args.{stage}.device: cuda, but the deployment {deployment} has no ray_actor_options.num_gpus"
            )


def _check_ongoing(app: AppConfig, value: int, where: str, ingress_replicas: int) -> None:
    try:
        check_max_ongoing_requests(app, value, where, ingress_replicas)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def _most_replicas(options: dict[str, Any]) -> int:
    autoscaling = options.get("autoscaling_config") or {}
    replicas = autoscaling.get("max_replicas") or options.get("num_replicas") or 1
    return replicas if isinstance(replicas, int) else 100  # "auto" goes up to 100


def unknown_keys(content: Any, model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Keys that Ray's schema does not know, and so ignores without a word, at any depth."""
    fields = {info.alias or name: info for name, info in model.model_fields.items()} | model.model_fields
    for key, value in content.items():
        if key not in fields:
            yield f"{where}{key}"
            continue
        items = {key: value}
        if isinstance(value, list):
            items = {f"{key}.{position}": item for position, item in enumerate(value)}
        for inner in _models(fields[key].annotation):
            for name, item in items.items():
                if isinstance(item, dict):
                    yield from unknown_keys(item, inner, f"{where}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The schemas among an annotation's alternatives and elements."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models(argument)]
