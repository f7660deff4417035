"""Ray's fake nodes, each with a folder of its own for what jobs bring along, as real machines have.

With Ray's own provider all nodes share one, and each that comes unpacks a job's working directory there anew,
while workers of the others import from it. Loaded by the autoscaler, which finds it by its name.
"""

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources-{self._next_node_id}"
            super()._create_node_with_resources_and_labels(*arguments)
