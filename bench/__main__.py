"""`python -m bench [engine] [imports] [brain] [--quick]`: measure, print, and write results.md and results.json."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.common import ROOT, machine

PARTS = {"engine": "Engine", "imports": "Imports", "brain": "Brain"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which to measure; all when none is named")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs; nothing is written")
    chosen = parser.parse_args()
    path = ROOT / "results.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for part in chosen.parts or PARTS:
        results, text = importlib.import_module(f"bench.{part}").main(chosen.quick)
        key = part if results.get("device", "cpu") == "cpu" else f"{part} on a GPU"  # a machine without one keeps what was measured on one
        report[key] = {"date": datetime.date.today().isoformat(), "machine": machine(), "results": results, "text": text}
        print(f"## {PARTS[part]}\n\n{text}")
    if chosen.quick:
        return
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    lines = ["# Speeds", "", "Written by `make bench`. Every figure is a ratio of things measured in turn in one run.", ""]
    for part, title in [pair for part, title in PARTS.items() for pair in ((part, title), (f"{part} on a GPU", f"{title} on a GPU"))]:
        if part in report:
            about = ", ".join(f"{k}: {v}" for k, v in report[part]["machine"].items())
            lines += [f"## {title}", "", f"*{report[part]['date']}; {about}*", "", report[part]["text"]]
    (ROOT / "results.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"written: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
