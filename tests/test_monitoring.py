"""configs/monitoring/ against what raypipe exports; tests/test_autoscaling.py scrapes a real run."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "configs" / "monitoring"
BOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    declared = re.findall(r'"(raypipe_\w+)"', (ROOT / "raypipe" / "monitoring.py").read_text())
    asked = {name for query in QUERIES for name in re.findall(r"ray_(raypipe_\w+)", query)}
    assert {re.sub("_(total|bucket)$", "", name) for name in asked} == set(declared)


def test_panels_do_not_lie_on_each_other() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's package prometheus")
def test_prometheus_accepts_config_and_queries(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    groups = [{"name": "dashboard", "rules": [{"record": f"q{i}", "expr": q} for i, q in enumerate(QUERIES)]}]
    rules.write_text(json.dumps({"groups": groups}))
    for what, file in (("config", MONITORING / "prometheus.yml"), ("rules", rules)):
        checked = subprocess.run(["promtool", "check", what, str(file)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
