"""Two steps of Ray's autoscaler that have no public name; imported here alone, so that another Ray breaks one file.

`node_provider` starts the machines of a cloud, and `config_of_ray_cluster` reads what KubeRay's operator is given.
"""

from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as config_of_ray_cluster,
)
from ray.autoscaler._private.providers import _get_node_provider as node_provider

__all__ = ["config_of_ray_cluster", "node_provider"]
