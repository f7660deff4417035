import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raypipe.events import EventFile


def test_a_killed_writers_later_steps_are_not_shown(tmp_path):
    with EventFile(tmp_path, 0) as killed:
        for step in (1, 2, 3):
            killed.scalar("loss", 10.0 * step, step)
            killed.histogram("weights", np.arange(4.0) * step, step)
        killed.flush()
    whole = (tmp_path / "events.out.tfevents.000000").read_bytes()
    (tmp_path / "events.out.tfevents.000000").write_bytes(whole[:-5])  # its last record is torn
    with EventFile(tmp_path, 1) as resumed:
        for step in (2, 3):
            resumed.scalar("loss", float(step), step)
            resumed.histogram("weights", np.arange(4.0), step)
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 10.0), (2, 2.0), (3, 3.0)]
    assert [e.step for e in shown.Tensors("weights")] == [1, 2, 3]
