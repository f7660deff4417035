"""One search as a value: what was asked, what it learns from, what it runs on, and where its files are."""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from raypipe.cluster import Claim
from raypipe.config import TuneConfig
from raypipe.dataset import Dataset, deal_at_random
from raypipe.splits import Splits
from raypipe.storage import Place
from raypipe.store import FeatureStore

TRIAL_FILE = "trial.json"
FAILED_FILE = "failed.json"


@dataclass(frozen=True)
class Run:
    """What the steps of a search share. No other place knows the names of its files."""

    config: TuneConfig
    folder: Place
    """On a disk that all nodes see, or in a bucket."""
    store: FeatureStore
    dataset: Dataset
    splits: Splits
    claim: Claim
    """What each trial claims."""
    at_once: int
    """Trials that train at the same time, for which decisions were planned."""
    started: datetime

    @cached_property
    def random_splits(self) -> Splits:
        """The training side once more, its clips dealt to the folds one by one: groups leak, on purpose."""
        return deal_at_random(self.dataset, self.splits, seed=self.config.seed)

    @property
    def trials(self) -> Place:
        return self.folder / "trials"

    @property
    def tune(self) -> Place:
        """Ray Tune's own notes; nothing is read from there again."""
        return self.folder / "ray-tune"

    def trial(self, trial_id: str) -> Place:
        """A trial's own folder: its curves, its state, what became of it."""
        return self.trials / f"trial-{trial_id}"

    def part(self, trial_id: str, number: int) -> Place:
        """The folder of one round of a trial (scheduler pbt); of round 0, a trial without rounds, its own."""
        return self.trial(trial_id) / f"round-{number:02}" if number else self.trial(trial_id)

    def trial_file(self, trial_id: str, number: int = 0) -> Place:
        """Lies there once the trial, or one round of it, has ended, and says how."""
        return self.part(trial_id, number) / TRIAL_FILE

    def failed_file(self, trial_id: str) -> Place:
        """How a trial had failed that is trained, or was trained, once more (--retry-failed)."""
        return self.trial(trial_id) / FAILED_FILE

    def out_of_fold(self, trial_id: str) -> Place:
        """[N, C] probabilities of a trial's models, as they gave them; NaN on the test side."""
        return self.trial(trial_id) / "out_of_fold.npy"

    @property
    def best(self) -> Place:
        return self.folder / "best"

    @property
    def report(self) -> Place:
        return self.folder / "report.html"

    @property
    def leaderboard(self) -> Place:
        return self.folder / "leaderboard.csv"
