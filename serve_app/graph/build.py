"""The graph: five deployments, bound as in the picture in ARCHITECTURE.md."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from serve_app.config.settings import DEPLOYMENTS, AppConfig, parse_config
from serve_app.graph.denoiser import Denoiser
from serve_app.graph.ingress import Ingress
from serve_app.graph.text_encoder import TextEncoder
from serve_app.graph.vae_decoder import VaeDecoder
from serve_app.models.check import check_sources


def build_app(args: dict[str, Any]) -> Application:
    """Builds the application from the `args` of a Ray Serve config file.

    Reads no weights, and no checkpoint needs to be on this machine: a head node may have no model
    volume. What is here is checked. Raises `ConfigurationError` with one line.
    """
    config = parse_config(args)
    check_sources(config, missing_ok=True)
    return build_graph(config)


def build_graph(config: AppConfig, overrides: dict[str, dict[str, Any]] | None = None) -> Application:
    """Binds the deployments. `overrides`: deployment options by name, as in Ray's `deployments:` list."""
    options = deployment_options(config, overrides)

    def bound(deployment: Any, name: str, *arguments: Any) -> Application:
        return deployment.options(**options[name]).bind(config, *arguments)

    text_encoder = bound(TextEncoder, "TextEncoder")
    base = bound(Denoiser, "BaseDenoiser", "denoise")
    refiner = None if config.refiner is None else bound(Denoiser, "Refiner", "refine")
    vae_decoder = bound(VaeDecoder, "VaeDecoder")

    return bound(Ingress, "Ingress", text_encoder, base, refiner, vae_decoder)


def deployment_options(
    config: AppConfig, overrides: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """The options of each deployment that a configuration starts, by name."""
    shared: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": 0.1},  # bookkeeping: config files say what a replica really takes
        # A stopped process is replaced after three checks that are not answered, some 25 s: about when a call that it
        # holds is made elsewhere (`calls`). One that is sent to it again meanwhile is not taken, and offered anew.
        "health_check_period_s": 2,
        "health_check_timeout_s": 8,
        "graceful_shutdown_timeout_s": 120,  # above the time of a slow image
        "max_constructor_retry_count": 3,  # for a volume's hiccup; a wrong checkpoint fails in its first second
    }

    names = [name for name in DEPLOYMENTS if name != "Refiner" or config.refiner is not None]
    return {name: {"name": name} | shared | (overrides or {}).get(name, {}) for name in names}
