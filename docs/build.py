"""The site: notebooks as they were executed, the API beside the code that makes it, journal and measurements.

`make docs` runs this. Sources are collected in _proc/, the site goes into _docs/; nothing is executed and no network is needed.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from api import entries
from notebooks import NOTEBOOKS, ROOT, notebooks, read, rewrite_links, split_directives

SOURCES, SITE = ROOT / "_proc" / "source", ROOT / "_docs"

# From the top of the house to the ground. A room that is not named here comes last.
ROOMS = {
    "league": ("The league", "The ruler: trivial zero, score, compute meter, Pareto report, lowering one layer into another."),
    "minds": ("Minds", "Everything that plays, from reflexes to language agents."),
    "rl": ("Learning by reward", "Rollouts, imitation, policy gradients, curricula, evaluation."),
    "ponder": ("Pondering", "Networks that choose how long to think."),
    "dream": ("Dreaming", "Latent dynamics, imagination, planning."),
    "belief": ("Belief", "Active inference."),
    "skills": ("Skills", "What is taught. One declaration each: prompts, pictures in, and what must come out."),
    "brain": ("The brain", "Eyes, words, canvases and heads: pictures and words in, pictures and words out."),
    "game": ("The game", "A batch of rooms as arrays: levels, physics, picture, facts, oracle, environments."),
    "lab": ("The lab", "Jobs, runs, checkpoints, weights, journal. It knows no other room, and every room may use it."),
}


def address_from(page: Path):
    "How a page in the site links to a file of the repository: only what the site holds has an address."

    def address(target: Path) -> str | None:
        for folder in (NOTEBOOKS, ROOT):
            if target.is_relative_to(folder):
                place = SOURCES / target.relative_to(folder)
                if place in _pages():
                    return os.path.relpath(place, page.parent)
        return None

    return address


def _texts() -> dict[Path, Path]:
    "Page -> the Markdown file of journal/ or bench/ that it is made of."
    return {SOURCES / f.relative_to(ROOT): f for folder in ("journal", "bench") for f in sorted((ROOT / folder).glob("*.md"))}


def _pages() -> set[Path]:
    return {SOURCES / n.relative_to(NOTEBOOKS) for n in notebooks()} | set(_texts())


def _toctree(pages: list[str], caption: str = "", hidden: bool = False, depth: int = 1) -> str:
    options = [f":maxdepth: {depth}"] + ([f":caption: {caption}"] if caption else []) + ([":hidden:"] if hidden else [])
    return "\n".join(["```{toctree}", *options, "", *pages, "```"])


def convert(notebook: Path) -> dict:
    "A notebook for MyST-NB: directives and hidden cells gone, exported code folded under its API entries, links moved."
    page = SOURCES / notebook.relative_to(NOTEBOOKS)
    content, module, cells = read(notebook), "", []

    def markdown(text: str, i: int) -> dict:
        return {"cell_type": "markdown", "id": f"page-{len(cells)}-{i}", "metadata": {}, "source": text}

    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cells.append(cell | {"source": rewrite_links(cell["source"], notebook.parent, address_from(page))})
            continue
        if cell["cell_type"] != "code":
            continue
        directives, source = split_directives(cell["source"])
        for directive in directives:
            if directive.startswith("default_exp"):
                module = f"compute_layers.{directive.split()[1]}"
        if "hide" in directives or not source:
            continue
        metadata = {"tags": list(cell["metadata"].get("tags", []))}
        if any(directive.split()[0] in ("export", "exporti", "exports") for directive in directives):
            cells += [markdown(text, i) for i, text in enumerate(entries(source, module))]
            lines = [line for line in source.splitlines() if line and not line.startswith((" ", ")", "#"))]
            label = "Imports" if all(line.startswith(("import ", "from ")) for line in lines) else "Source"
            metadata = {"tags": ["hide-input"], "mystnb": {"code_prompt_show": label, "code_prompt_hide": label}}
        cells.append(cell | {"source": source, "metadata": metadata})
    # A widget's saved state would make the page load scripts from elsewhere; its text is shown instead (conf.py).
    return content | {"cells": cells, "metadata": {key: value for key, value in content["metadata"].items() if key != "widgets"}}


def _title_and_lead(notebook: Path) -> tuple[str, str]:
    "What a notebook's first cell says: the H1, and the line below it."
    first = read(notebook)["cells"][0]["source"]
    title, lead = re.search(r"^# (.+)$", first, re.MULTILINE), re.search(r"^> (.+)$", first, re.MULTILINE)
    return title[1] if title else notebook.stem, lead[1] if lead else ""


def _in_order(room: Path) -> list[str]:
    "The notebooks of a room, each after those whose modules it imports."
    names = {n.stem: re.findall(rf"compute_layers\.{room.name}(?:\.| import )(\w+)", n.read_text()) for n in sorted(room.glob("*.ipynb"))}
    ordered: list[str] = []

    def place(name: str, above: tuple[str, ...] = ()) -> None:
        if name in names and name not in ordered and name not in above:
            for below in names[name]:
                place(below, (*above, name))
            ordered.append(name)

    for name in names:
        place(name)
    return ordered


def _journal_page(text: str) -> str:
    "An entry's front matter as a table below its title, where a reader sees it."
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not found:
        return text
    matter, body = yaml.safe_load(found[1]) or {}, text[found.end():].lstrip("\n")
    rows = [f"| {key} | {_plain(value)} |" for key, value in matter.items() if key != "title" and value not in (None, "", [], {}, False)]
    table = "\n".join(["| | |", "|---|---|", *rows])
    title, rest = body.split("\n", 1) if body.startswith("# ") else (f"# {matter.get('title', 'Entry')}", body)
    return f"{title}\n\n{table}\n\n{rest}"


def _plain(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _append(page: Path, text: str) -> None:
    "One more Markdown cell at the end of a notebook that is a source of the site."
    content = json.loads(page.read_text(encoding="utf8"))
    content["cells"].append({"cell_type": "markdown", "id": "page-tree", "metadata": {}, "source": text})
    page.write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")


def collect() -> None:
    "Write all sources of the site into _proc/."
    shutil.rmtree(SOURCES, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    for notebook in notebooks():
        page = SOURCES / notebook.relative_to(NOTEBOOKS)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(convert(notebook), ensure_ascii=False), encoding="utf8")
    for page, text in _texts().items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(rewrite_links(_journal_page(text.read_text(encoding="utf8")), text.parent, address_from(page)), encoding="utf8")

    folders = {p.parent.name for p in notebooks() if p.parent != NOTEBOOKS}
    rooms = [r for r in ROOMS if r in folders] + sorted(folders - set(ROOMS))
    for room in rooms:
        names = [name for name in _in_order(NOTEBOOKS / room) if name != "index"]
        about = {name: _title_and_lead(NOTEBOOKS / room / f"{name}.ipynb") for name in names}
        links = "\n".join(f"| [{title}]({name}.ipynb) | {lead} |" for name, (title, lead) in about.items())
        rest = f"| notebook | what it is |\n|---|---|\n{links}\n\n{_toctree(names, hidden=True)}\n"
        if (SOURCES / room / "index.ipynb").exists():
            _append(SOURCES / room / "index.ipynb", f"## The notebooks of this room\n\n{rest}")
        else:
            title, lead = ROOMS.get(room, (room, ""))
            (SOURCES / room / "index.md").write_text(f"# {title}\n\n> {lead}\n\n{rest}", encoding="utf8")

    records = []
    for folder, title in (("journal", "The journal"), ("bench", "Speed")):
        pages = sorted(p.stem for p in _texts() if p.parent.name == folder)
        top = pages[0] if len(pages) == 1 else next((name for name in ("index", "README") if name in pages), None)
        if pages:
            rest = [p for p in reversed(pages) if p != top]  # the newest first
            head = (SOURCES / folder / f"{top}.md").read_text(encoding="utf8") if top else f"# {title}\n"
            (SOURCES / folder / f"{top or 'index'}.md").write_text(f"{head}\n\n{_toctree(rest, hidden=bool(top))}\n" if rest else head)
            records.append(f"{folder}/{top or 'index'}")

    tutorials = [n.stem for n in notebooks() if n.parent == NOTEBOOKS and n.stem.startswith("tutorial")]
    others = [n.stem for n in notebooks() if n.parent == NOTEBOOKS and n.stem not in ("index", *tutorials)]
    trees = [(tutorials, "Tutorials"), ([f"{room}/index" for room in rooms] + others, "Rooms"), (records, "Records")]
    _append(SOURCES / "index.ipynb", "\n\n".join(_toctree(pages, caption, hidden=True, depth=2) for pages, caption in trees if pages))


def main() -> int:
    "Collect the sources and build them; warnings fail the build."
    collect()
    built = SOURCES.parent / "site"
    shutil.rmtree(built, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs"), str(SOURCES), str(built)]
    status = subprocess.run(command).returncode
    if status == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.move(built, SITE)
    return status


if __name__ == "__main__":
    sys.exit(main())
