"""Where a run's files are, on a disk and in a bucket."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from raypipe.cluster import Claim
from raypipe.config import TuneConfig
from raypipe.run import Run
from raypipe.storage import Place, RemotePath


@pytest.mark.parametrize("folder", [Path("/results/tune"), RemotePath("s3://bucket/tune?region=eu-west-1")])
def test_rounds_are_in_their_trials_folder_and_round_0_is_it(folder: Place) -> None:
    nothing: Any = None
    claim = Claim(cpus=1, gpus=0, replicas=2)
    run = Run(TuneConfig(), folder, nothing, nothing, nothing, claim, at_once=1, started=datetime.now())
    assert run.part("7", 0) == run.trial("7") == folder / "trials" / "trial-7"
    assert run.part("7", 3) == folder / "trials" / "trial-7" / "round-03"
    assert run.trial_file("7", 3).parent == run.part("7", 3)
    files = [run.trial_file("7"), run.failed_file("7"), run.out_of_fold("7"), run.report, run.leaderboard]
    assert len({str(file) for file in files}) == len(files)
