"""What the GPUs of a process do meanwhile, by NVML: use, memory, energy. Nothing where there is no NVML.

meter = GpuMeter(gpus)
meter.begin()
...                    # an epoch
figures = meter.end()
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

SAMPLE_EVERY_S = 0.2
"""NVML itself takes the mean use over 1/6 s to 1 s, by card."""


@dataclass(frozen=True)
class GpuFigures:
    """What the GPUs of one process did in a span of time. None: not measured, or the card does not tell."""

    use: float | None = None
    """Share of the time in which a GPU computed, 0 to 1, mean over the GPUs."""
    memory_mb: float | None = None
    """MiB in use on the fullest GPU at its fullest."""
    energy_j: float | None = None
    """Joules drawn by all GPUs together."""


class GpuMeter:
    """Measures the GPUs that Ray gave this process, span by span."""

    def __init__(self, gpus: int, *, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._cards = self._open(visible_cards(os.environ, gpus)) if gpus else []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._uses: list[float] = []
        self._memories_mb: list[float] = []
        self._energy_j: float | None = None

    def begin(self) -> None:
        """Starts a span; samples are taken in a thread of its own."""
        if not self._cards:
            return
        self._uses, self._memories_mb, self._energy_j = [], [], self._energy()
        self._ended.clear()
        self._thread = threading.Thread(target=self._sample, name="gpu-meter", daemon=True)
        self._thread.start()

    def end(self) -> GpuFigures:
        """What was measured since `begin`."""
        if self._thread is None:
            return GpuFigures()
        self._ended.set()
        self._thread.join()
        self._thread = None
        now_j = self._energy()
        return GpuFigures(
            use=sum(self._uses) / len(self._uses) if self._uses else None,
            memory_mb=max(self._memories_mb, default=None),
            energy_j=None if now_j is None or self._energy_j is None else now_j - self._energy_j,
        )

    def _sample(self) -> None:
        while True:
            for card in self._cards:
                rates = self._told(self._nvml.nvmlDeviceGetUtilizationRates, card)
                memory = self._told(self._nvml.nvmlDeviceGetMemoryInfo, card)
                if rates is not None:
                    self._uses.append(rates.gpu / 100)
                if memory is not None:
                    self._memories_mb.append(memory.used / 2**20)
            if self._ended.wait(SAMPLE_EVERY_S):
                return

    def _energy(self) -> float | None:
        """Joules that all cards have drawn since their driver started; cards before Volta do not count."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        drawn_mj = [self._told(read, card) for card in self._cards]
        return None if None in drawn_mj else sum(drawn_mj) / 1000

    def _open(self, names: Sequence[str]) -> list[Any]:
        def handle(name: str) -> Any:
            if name.isdecimal():
                return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
            return self._nvml.nvmlDeviceGetHandleByUUID(name)

        try:
            self._nvml.nvmlInit()
            return [handle(name) for name in names]
        except self._nvml.NVMLError:
            return []  # no driver, or GPUs that Ray only believes in

    def _told(self, read: Callable[[Any], Any], card: Any) -> Any:
        try:
            return read(card)
        except self._nvml.NVMLError:
            return None  # this card does not tell, as a MIG slice its use


def visible_cards(environment: Any, gpus: int) -> list[str]:
    """Numbers or UUIDs of the GPUs that this process may use, as NVML counts them.

    >>> visible_cards({"CUDA_VISIBLE_DEVICES": "2,GPU-5f"}, 2), visible_cards({}, 2)
    (['2', 'GPU-5f'], ['0', '1'])
    """
    named = environment.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(gpus)]
