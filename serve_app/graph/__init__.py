"""The Ray Serve deployments: handles and configuration in, load in `__init__`, delegate.

Each imports its stage in `__init__`: the process that builds the graph and the ingress load no torch.
`serve_app.graph:build_app` is what a Ray Serve config file names; it is loaded on use, since `graph.local` has
settings to make before Ray is first imported.
"""

from __future__ import annotations

from typing import Any


def build_app(args: dict[str, Any]) -> Any:
    """The application of a Ray Serve config file; see `graph.build`."""
    from serve_app.graph import build

    return build.build_app(args)
