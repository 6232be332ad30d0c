"""`python -m bench [engine] [imports] [brain] [rollout] [--quick]`: measure, print, and write results.md and results.json."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.common import ROOT, machine

PARTS = {"engine": "Engine", "imports": "Imports", "brain": "Brain", "rollout": "Rollouts"}
ON_A_GPU = " on a GPU"  # figures of a part that were measured on one stand beside those of a CPU


def write_table(report: dict) -> None:
    """results.md, from what results.json holds."""
    lines = ["# Speeds", "", "Written by `make bench`. Every figure is a ratio of things measured in turn in one run.", ""]
    for key in (part + where for part in PARTS for where in ("", ON_A_GPU) if part + where in report):
        about = ", ".join(f"{k}: {v}" for k, v in report[key]["machine"].items())
        lines += [f"## {PARTS[key.removesuffix(ON_A_GPU)]}{ON_A_GPU if key.endswith(ON_A_GPU) else ''}", "", f"*{report[key]['date']}; {about}*", "", report[key]["text"]]
    (ROOT / "results.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which to measure; all when none is named")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs; nothing is written")
    chosen = parser.parse_args()
    path = ROOT / "results.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for part in chosen.parts or PARTS:
        results, text = importlib.import_module(f"bench.{part}").main(chosen.quick)
        key = part if results.get("device", "cpu") == "cpu" else part + ON_A_GPU
        report[key] = {"date": datetime.date.today().isoformat(), "machine": machine(), "results": results, "text": text}
        print(f"## {PARTS[part]}\n\n{text}")
    if chosen.quick:
        return
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_table(report)
    print(f"written: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
