"""How long the imports take in a fresh process, disk caches warm."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from bench.common import table

TARGETS = {"compute_layers": 0.3, "compute_layers.game": 1.5}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(quick: bool = False) -> tuple[dict, str]:
    results, rows = {}, []
    names = {"pass": "pass", **{name: f"import {name}, sys; assert 'torch' not in sys.modules" for name in TARGETS}}
    times = {name: [] for name in names}
    for repeat in range(3 if quick else 10):
        for name, statement in names.items():
            taken = seconds(statement)
            if repeat:  # the first round warms the caches
                times[name].append(taken)
    bare = median(times["pass"])
    for name, target in TARGETS.items():
        results[name] = {"seconds": round(median(times[name]), 3), "times an empty Python": round(median(times[name]) / bare, 1), "target": target}
        rows.append([f"`import {name}`", f"{median(times[name]):.2f} s", f"{median(times[name]) / bare:.1f}×", f"< {target} s", "✓" if median(times[name]) < target else "✗"])
    return results, "The whole process, start of Python included; median. Neither imports torch.\n\n" + table(
        ["", "wall time", "× an empty Python", "target", ""], rows
    ) + "\n"
