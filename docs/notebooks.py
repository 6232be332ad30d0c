"""What the README and the site share: reading notebooks, and making links point to the right place."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"

_DIRECTIVE = re.compile(r"^\s*#\|\s*(\S.*?)\s*$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def read(path: Path) -> dict:
    "A notebook as the dict that nbformat describes, every cell's source as one string."
    notebook = json.loads(path.read_text(encoding="utf8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def notebooks() -> list[Path]:
    "Every notebook that belongs to the library, sorted by path; drafts and leftovers (`_x`, `.x`) do not."
    found = NOTEBOOKS.rglob("*.ipynb")
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(NOTEBOOKS).parts))


def split_directives(source: str) -> tuple[set[str], str]:
    "nbdev's `#| word ...` lines, as the set of their texts, and the source without them."
    kept, directives = [], set()
    for line in source.splitlines():
        found = _DIRECTIVE.match(line)
        directives.add(found[1]) if found else kept.append(line)
    return directives, "\n".join(kept).strip("\n")


def text_of(value: str | list[str]) -> str:
    "Text in a notebook's output, which is a string or a list of lines."
    return value if isinstance(value, str) else "".join(value)


def rewrite_links(
    markdown: str,
    folder: Path,                             # where the text stands now: relative links start here
    new_address: Callable[[Path], str | None],  # file of this repository -> its address in the new place; None: no link
) -> str:
    "Every relative link and picture of a text that moves. Code is left alone, a link without an address becomes plain text."

    def rewritten(match: re.Match) -> str:
        picture, text, address = match.groups()
        path, hash_sign, fragment = address.partition("#")
        if "://" in address or address.startswith("mailto:") or not path:
            return match[0]
        new = new_address(Path(os.path.normpath(folder / path)))
        return text if new is None else f"{picture}[{text}]({new}{hash_sign}{fragment})"

    pieces = _CODE.split(markdown)
    return "".join(piece if i % 2 else _LINK.sub(rewritten, piece) for i, piece in enumerate(pieces))
