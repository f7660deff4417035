"""What stands still after a node was lost is given up. tests/test_nodes.py loses nodes that are at work."""

import subprocess
import sys

import pytest

HANGS = """
import threading, time
from functools import partial
import ray, ray.data
from ray.cluster_utils import Cluster
from raypipe import watch
from raypipe.monitoring import RunMeter
from raypipe.progress import Tally

watch.LOOK_EVERY_S, watch.STILL_S = 0.2, 1.0
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)
node = cluster.add_node(num_cpus=1)
tally = ray.remote(Tally).options(num_cpus=0).remote()
context = ray.data.DataContext.get_current()
context.custom_execution_callback_classes = [partial(watch.Watch, tally, RunMeter(), 600)]

class Hangs:
    def __init__(self, tally):
        self.tally, self.actor = tally, ray.get_runtime_context().get_actor_id()

    def __call__(self, rows):
        ray.get(self.tally.begin.remote(self.actor, "worker", "decoding", str(rows["video"])))
        time.sleep(600)
        return rows

def lose():
    while len(ray.get(tally.steps.remote())) < 2:  # one on each node
        time.sleep(0.1)
    cluster.remove_node(node)

threading.Thread(target=lose).start()
one_each = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1)
hanging = ray.data.from_items([{"video": 1}, {"video": 2}], override_num_blocks=2).map_batches(
    Hangs, fn_constructor_args=(tally,), compute=one_each
)
try:
    list(hanging.iter_batches())
except watch.NodesLost as lost:
    print(lost)
ray.get(ray.remote(num_cpus=1)(lambda: None).remote())
print("the worker that hung has left its core")
"""


@pytest.mark.slow
def test_an_execution_that_stands_still_after_a_node_was_lost() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=250)
    assert "a node was lost and nothing has moved for 0:" in done.stdout, done.stderr
    assert "the worker that hung has left its core" in done.stdout
