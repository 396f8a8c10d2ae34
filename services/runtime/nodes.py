"""What a running cluster offers, as the nodes that :mod:`services.runtime.placement` packs onto."""

from __future__ import annotations

from configs.schema import RunConfig
from services.runtime import cluster
from services.runtime.placement import Node, nodes_from_ray


def running_nodes(config: RunConfig) -> list[Node]:
    """The living nodes of the cluster at ``cluster.address``. Joins it for the question and leaves again.

    ServiceError when there is no cluster.
    """
    with cluster.running(config):
        import ray

        return nodes_from_ray(ray.nodes())
