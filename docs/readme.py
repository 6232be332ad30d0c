"""README.md from nbs/index.ipynb: `python docs/readme.py`, or `make readme`.

nbdev's own command for this needs quarto, which is more than Python and make.
"""
from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import NOTEBOOKS, ROOT, read, rewrite_links, split_directives, text_of

PICTURES = "docs/pictures"  # where the README's pictures lie, from the root of the repository


def readme(
    notebook: Path = NOTEBOOKS / "index.ipynb",
) -> tuple[str, dict[str, bytes]]:  # the text, and its pictures by path from the root of the repository
    "The README: markdown as it is, code cells in fences, their outputs below them; hidden cells left out."
    blocks: list[str] = ["<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook, not this page. -->"]
    pictures: dict[str, bytes] = {}

    def from_root(target: Path) -> str:
        return Path(os.path.relpath(target, ROOT)).as_posix()

    for cell in read(notebook)["cells"]:
        if cell["cell_type"] == "markdown":
            blocks.append(rewrite_links(cell["source"].strip(), notebook.parent, from_root))
        if cell["cell_type"] != "code":
            continue
        directives, source = split_directives(cell["source"])
        if directives & {"hide", "export"} or any(d.startswith("default_exp") for d in directives):
            continue
        if source and not any(d in ("echo: false", "echo:false") for d in directives):
            blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{PICTURES}/readme-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(text_of(data["image/png"]))
                blocks.append(f"![]({name})")
            elif "text/markdown" in data:
                blocks.append(text_of(data["text/markdown"]).strip())
            elif "text/plain" in data or output["output_type"] == "stream":
                text = text_of(data["text/plain"] if data else output["text"]).rstrip("\n")
                blocks.append(f"```text\n{text}\n```")
    return "\n\n".join(blocks) + "\n", pictures


def main() -> None:
    text, pictures = readme()
    (ROOT / "README.md").write_text(text, encoding="utf8")
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    print(f"README.md: {len(text.splitlines())} lines, {len(pictures)} pictures")


if __name__ == "__main__":
    main()
