"""The site builds from what the notebooks hold, without a warning; API entries say what the code says."""
from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import api  # noqa: E402
import build  # noqa: E402
import notebooks  # noqa: E402

EXAMPLE = '''
SIZE = 64 # pixels a side

def draw(
    world: World,            # the rooms,
                             # B of them
    size: int = 64,          # pixels
    *points: "Point",        # a | b
) -> Array:                  # (B, size, size, 3)
    """Pictures of rooms.

    Raises ValueError for a negative size.
    """

def plain(x: int) -> int:
    "Nothing to add."

def _hidden(): ...

@dataclass
class Room:
    "One room."
    walls: Array         # (W, 5)
    gold: int = 1        # pieces

    @property
    def empty(self) -> bool:
        "No gold left."

    def take(self, rows: int) -> "Room":
        "Some of it."
'''


def test_api_entries() -> None:
    draw, plain, room, constants = api.entries(EXAMPLE, "compute_layers.game.picture")
    assert draw.startswith("::::::{py:function} draw(world: World, size: int=64, *points: 'Point') -> Array\n:module: compute_layers.game.picture")
    assert "| `world` | `World` |  | the rooms, B of them |" in draw
    assert "| `size` | `int` | `64` | pixels |" in draw
    assert "| `*points` | `Point` |  | a \\| b |" in draw
    assert "| **returns** | `Array` |  | (B, size, size, 3) |" in draw
    assert "Raises ValueError for a negative size." in draw
    assert "|" not in plain, "without comments the signature says it all"
    assert "{py:class} Room(walls: Array, gold: int = 1)" in room and "| `gold` | `int` | `1` | pieces |" in room
    assert "{py:property} Room.empty\n:module: compute_layers.game.picture\n:type: bool" in room
    assert "{py:method} Room.take(rows: int) -> Room" in room
    assert "| `SIZE` | `64` | pixels a side |" in constants


def test_links_move_with_their_text() -> None:
    text = "[a](x.md#top) [b](https://e.org) [c](gone.md) `[d](x.md)` ![e](p.png)"
    moved = notebooks.rewrite_links(text, Path("/r/nbs"), lambda target: None if target.name == "gone.md" else f"new/{target.name}")
    assert moved == "[a](new/x.md#top) [b](https://e.org) c `[d](x.md)` ![e](new/p.png)"


def test_site_builds_without_warnings_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", tmp_path / "proc" / "source")
    monkeypatch.setattr(build, "SITE", tmp_path / "site")
    assert build.main() == 0
    pages = {p.relative_to(tmp_path / "site").as_posix(): p.read_text(encoding="utf8") for p in (tmp_path / "site").rglob("*.html")}
    for notebook in notebooks.notebooks():
        assert notebook.relative_to(notebooks.NOTEBOOKS).with_suffix(".html").as_posix() in pages
    assert 'id="compute_layers.game.world.World"' in pages["game/world.html"]
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', page)
        assert not loaded, f"{name} loads {loaded}"
