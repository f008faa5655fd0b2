"""Octavo on Ray Serve: `serve run octavo.deploy.ray:build_app model=MODEL`. Extra `ray`.

    options          what an app is made of, from the arguments of a YAML file; checks of a cluster
    app              the deployments: engines, and ingresses with the HTTP API before them
    replica          one engine, spoken to in token ids
    fleet            an ingress's side of all engines, over `octavo.fleet`
    request_router   Ray Serve's, which does what the ingress says
    autoscaling      how many engines there should be
    ranks            tensor parallel ranks as actors

Only `app`, `ranks` and `request_router` import Ray, and nothing else of Octavo imports this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def build_app(args: Mapping[str, Any]) -> Any:
    """Returns a Ray Serve application. `args`: see `options.read_app_options`.

    Raises ConfigError, also where the cluster has not what is asked for.
    """
    from octavo.deploy.ray.app import build
    from octavo.deploy.ray.options import read_app_options

    return build(read_app_options(args))
