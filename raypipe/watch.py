"""Watches an extraction that runs: where nothing moves it ends, or begins anew if nodes were lost.

Ray itself waits for ever for a task it gave to a node that falls silent while its connections stay, as a
machine that hangs does. (It gives up such calls to actors.) And it sees movement only where a task hands on
its rows, after dozens of videos; here each video counts. Imports Ray: import it after `cluster.connect`.
"""

import math
import re
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from raypipe.cluster import ask
from raypipe.console import duration
from raypipe.monitoring import RunMeter

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

LOOK_EVERY_S = 5.0
STILL_S = 60.0
"""After nodes were lost: how long no worker may end, or go on to, a video before the rest begins anew.

Where that was too short only what is at hand is done twice, once for each time that nodes are lost.
"""


class NodesLost(ExecutionTimeoutError):
    """Nodes were lost, and with them work that would be waited for in vain."""


class Stalled(ExecutionTimeoutError):
    """Nothing has moved for longer than the slowest step can take. Says which stages were at work."""


class Watch(ExecutionCallback):
    """Watches one execution of Ray Data, whose scheduling loop calls it. Raises NodesLost and Stalled there.

    `patience_s`: how long no worker may end or begin a step, and no stage hand on rows.
    """

    def __init__(self, tally: Any, meter: RunMeter, patience_s: float) -> None:
        self._tally, self._meter, self._patience_s = tally, meter, patience_s
        self._at_work: frozenset[str] = frozenset()
        self._looked_s, self._moved_s = -math.inf, time.monotonic()
        self._seen: object = None

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        if time.monotonic() < self._looked_s + LOOK_EVERY_S:
            return
        for operator, state in executor._topology.items():
            for stage in stages(operator):
                self._meter.queued(stage, state.total_enqueued_input_blocks())
        self._at_work |= nodes_at_work(executor)
        lost = self._at_work - nodes_alive()
        seen = (lost, self._movement(executor))
        self._looked_s = time.monotonic()
        if seen != self._seen:
            self._seen, self._moved_s = seen, self._looked_s
        still_s = self._looked_s - self._moved_s
        if lost and still_s >= STILL_S:
            end_workers(executor)
            nodes = "a node was lost" if len(lost) == 1 else f"{len(lost)} nodes were lost"
            raise NodesLost(f"{nodes} and nothing has moved for {duration(still_s)}")
        if still_s >= self._patience_s:
            active = stages_at_work(executor)
            end_workers(executor)
            raise Stalled(" or ".join(active))

    def _movement(self, executor: "StreamingExecutor") -> object:
        """What differs as long as any worker gets on."""
        told = ask([self._tally.counts.remote(), self._tally.steps.remote()], None)
        return told, [operator.metrics.num_outputs_taken for operator in executor._topology]


def nodes_alive() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def nodes_at_work(executor: "StreamingExecutor") -> frozenset[str]:
    """Nodes with a worker of ours."""
    pools = (pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools())
    return frozenset(state.actor_location for pool in pools for state in pool._running_actors.values())


def stages(operator: "PhysicalOperator") -> list[str]:
    """The names of our classes in it, usually one."""
    return re.findall(r"\((\w+)\)", operator.name)


def stages_at_work(executor: "StreamingExecutor") -> list[str]:
    busy = (operator for operator in executor._topology if operator.num_active_tasks())
    return [stage for operator in busy for stage in stages(operator)]


def end_workers(executor: "StreamingExecutor") -> None:
    """At once: by itself, Ray Data lets them finish what they have begun, which others will do again."""
    for operator in executor._topology:
        for pool in operator.get_autoscaling_actor_pools():
            pool.shutdown(force=True)
