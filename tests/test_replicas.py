"""N replicas give what one gives. Each case runs in a process of its own: one strategy per process.

The machine has no GPU: the replicas are logical CPU devices, which take the same path through TensorFlow.
"""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from raypipe.replicas import precision_policy

# Trains with so many replicas on random clips and prints losses and predictions as JSON.
SCRIPT = """
import json, sys
import numpy as np
from raypipe.config import TrialConfig
from raypipe.models import build_model
from raypipe.replicas import Replicas, find_devices
import keras

replicas, clip_norm, model = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
labels = rng.integers(0, 2, 30)
features = (rng.normal(size=(30, 4, 12)) + labels[:, None, None]).astype(np.float16)
config = TrialConfig(model=model, width=8, dropout=0.0, learning_rate=0.01, batch_size=8, clip_norm=clip_norm)
engine = Replicas(find_devices(0, replicas), config,
                  lambda: build_model(config, steps=4, dim=12, classes=2), features, labels)
start = engine.state()
losses = [engine.train_epoch(np.resize(rng.permutation(23), 24), np.array([1.0, 2.0])) for _ in range(4)]
after = engine.predict(np.arange(29))
engine.restore(start)
again = engine.predict(np.arange(29))
print(json.dumps({"losses": losses, "after": after.tolist(), "again": again.tolist()}))
"""


@functools.cache
def train(replicas: int, clip_norm: float, model: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(replicas), str(clip_norm), model], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("model", "clip_norm", "replicas"),
    [
        ("mean_pool", 0.05, 2),
        ("mean_pool", 0.05, 4),
        ("mean_pool", 1000.0, 2),
        ("bilstm_attention", 0.05, 2),
    ],
)
def test_several_replicas_train_as_one(model, clip_norm, replicas):
    one, several = train(1, clip_norm, model), train(replicas, clip_norm, model)
    assert one["losses"][0] > one["losses"][-1], "it learns"
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(several["after"], one["after"], atol=1e-4)
    assert len(one["after"]) == 29, "an uneven number of clips is predicted, each once"
    np.testing.assert_array_equal(one["again"], 0.5)  # the untrained state was put back


def test_clipping_does_something_here():
    # Otherwise the test above would not see clipping at the wrong place.
    assert train(1, 0.05, "mean_pool")["losses"][1:] != train(1, 1000.0, "mean_pool")["losses"][1:]


OVERFLOW = """
import sys
import numpy as np, tensorflow as tf, keras
from raypipe.replicas import ReplicaAdamW, ReplicaLossScale

bad = int(sys.argv[1])
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    weight = keras.Variable(np.ones(3, np.float32))
    optimizer = ReplicaLossScale(ReplicaAdamW(0.1), initial_scale=8.0)
    optimizer.build([weight])

@tf.function
def step(bad):
    def replica():
        here = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.where(here == bad, tf.fill([3], float("inf")), tf.ones([3]))
        optimizer.apply([gradient], [weight])
    strategy.run(replica)

step(tf.constant(bad))
print(float(np.abs(weight.numpy() - 1).max()), float(optimizer.dynamic_scale.numpy()))
"""


@pytest.mark.parametrize(("bad", "moved", "scale"), [(0, False, 4.0), (1, False, 4.0), (-1, True, 8.0)])
def test_an_overflow_on_any_replica_skips_the_step_and_lowers_the_scale(bad, moved, scale):
    run = subprocess.run([sys.executable, "-c", OVERFLOW, str(bad)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    change, after = map(float, run.stdout.split()[-2:])
    assert (change > 0, after) == (moved, scale)


@pytest.mark.parametrize(
    ("capability", "policy"),
    [
        ((6, 1), "float32"),
        ((7, 0), "mixed_float16"),
        ((7, 5), "mixed_float16"),
        ((8, 0), "mixed_bfloat16"),
        ((9, 0), "mixed_bfloat16"),
    ],
)
def test_precision_follows_the_card(capability, policy):
    assert precision_policy(capability) == policy
