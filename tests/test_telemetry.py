"""There is no NVIDIA card here: a hand-written NVML stands in for it, with cards that tell less or more."""

import time
from types import SimpleNamespace

import pytest

from raypipe.telemetry import GpuFigures, GpuMeter


class Nvml:
    """Two cards; the second is busier and fuller. Energy rises by 10 J a card with each reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, silent=(), driver=True):
        self._silent, self._driver, self._energy_mj = silent, driver, {}
        self.opened = []

    def nvmlInit(self):
        if not self._driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, number):
        if number > 1:
            raise self.NVMLError("Invalid Argument")
        self.opened.append(number)
        return number

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.opened.append(uuid)
        return int(uuid[-1])

    def nvmlDeviceGetUtilizationRates(self, card):
        self._speak("use")
        return SimpleNamespace(gpu=[40, 80][card])

    def nvmlDeviceGetMemoryInfo(self, card):
        self._speak("memory")
        return SimpleNamespace(used=[1, 3][card] * 2**30)

    def nvmlDeviceGetTotalEnergyConsumption(self, card):
        self._speak("energy")
        self._energy_mj[card] = self._energy_mj.get(card, 5_000_000) + 10_000
        return self._energy_mj[card]

    def _speak(self, what):
        if what in self._silent:
            raise self.NVMLError("Not Supported")


def measure(gpus, nvml):
    meter = GpuMeter(gpus, nvml=nvml)
    meter.begin()
    time.sleep(0.01)
    return meter.end()


ALL = {"use": pytest.approx(0.6), "memory_mb": 3072.0, "energy_j": pytest.approx(20.0)}


@pytest.mark.parametrize(
    ("silent", "said"),
    [
        ([], ALL),
        (["use"], ALL | {"use": None}),
        (["energy"], ALL | {"energy_j": None}),
        (["use", "memory", "energy"], dict.fromkeys(ALL)),
    ],
)
def test_figures_of_two_cards(monkeypatch, silent, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert vars(measure(2, Nvml(silent=silent))) == said


def test_the_cards_that_ray_gave_are_measured_and_no_others(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    nvml = Nvml()
    assert measure(1, nvml).use == pytest.approx(0.8)
    assert nvml.opened == ["GPU-1"]


def test_each_span_has_its_own_figures(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = GpuMeter(1, nvml=Nvml())
    for _ in range(2):
        meter.begin()
        assert meter.end().energy_j == pytest.approx(10.0)
    assert meter.end() == GpuFigures(), "no span was begun"


@pytest.mark.parametrize(
    ("gpus", "nvml"), [(0, Nvml()), (2, Nvml(driver=False)), (4, Nvml())], ids=["cpu", "no driver", "no card"]
)
def test_without_cards_nothing_is_measured(monkeypatch, gpus, nvml):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert measure(gpus, nvml) == GpuFigures(None, None, None)


def test_without_a_driver_on_this_machine_nothing_is_measured():
    meter = GpuMeter(1)
    meter.begin()
    assert meter.end() == GpuFigures() or meter._cards  # a machine with a card measures it
