"""Timing that survives a busy machine: CPU time of one thread, contestants in turn, ratios within each round."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Callable

ROOT = Path(__file__).resolve().parent


def cpu_seconds(work: Callable[[], int], at_least: float, clock: Callable[[], float] = time.thread_time) -> tuple[float, int]:
    """Repeat `work`, which returns how many units it did, until `at_least` CPU seconds (or those of another clock) are used; return seconds and units."""
    units, start = 0, clock()
    while True:
        units += work()
        used = clock() - start
        if used >= at_least:
            return used, units


def race(
    contestants: dict[str, Callable[[], int]],  # name: one piece of work, which returns its units
    rounds: int = 9,
    slice_seconds: float = 0.12,  # CPU seconds a contestant has in each round
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:  # name: units per CPU second, one number a round
    """Let the contestants take turns, so that what disturbs one disturbs all of a round."""
    for work in contestants.values():
        work()  # compiled, allocated, pages touched
    rates = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            used, units = cpu_seconds(work, slice_seconds, clock)
            rates[name].append(units / used)
    return rates


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """The median over the rounds of rate(one) / rate(other)."""
    return median(a / b for a, b in zip(rates[one], rates[other]))


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB when the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    torch = sys.modules.get("torch")  # where nothing was computed with it, no GPU was
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    return {
        **gpu, "cpu": model, "cores": os.cpu_count(), "last level cache, MiB": cache_bytes() // 2**20, "load at the start": load,
        "python": platform.python_version(),
    }


def table(heads: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; numbers are aligned right."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(heads))) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
