"""The engine against a memory fill, a straightforward pygame drawing of the same rooms, and MiniGrid's renderer."""

from __future__ import annotations

import ctypes
import math
import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import numpy as np

import compute_layers.game as game
from compute_layers.game import fast, levels
from compute_layers.game.world import AGENT_RADIUS, EYE_AHEAD, EYE_RADIUS, GOLD_RADIUS
from bench.common import cache_bytes, median, race, ratio, table

SIZES = (64, 224)
CACHED_ROOMS = {64: 256, 224: 21}  # 3.1 MB of pictures, and as many rooms as a trainer steps
TARGETS = {"times pygame": 40.0, "of memset, cached": 0.30, "of memset, spilled": 0.75, "anti-aliased to hard-edged": 0.80}


def engines(size: int, rooms: int, kind: str) -> dict:
    """The contestants on one block of pictures: name -> work that plays one step of all rooms and returns their number."""
    make = game.GoldRoomVector if kind == "bare" else game.GoldRoomWallsVector
    chance = np.random.default_rng(0)
    actions = [chance.integers(0, 5, rooms) for _ in range(32)]
    block = np.zeros((rooms, size, 3 * size), np.uint8)

    def fill():
        ctypes.memset(block.ctypes.data, 255, block.nbytes)
        return rooms

    def environment(antialias, copy):
        env = make(rooms, size=size, antialias=antialias, copy=copy, oracle_steps=False)
        env.reset(seed=1)
        if not copy:
            env.rooms.frames = block  # all contestants write the same memory
            env.rooms.reset(np.ones(rooms, bool), None)
        turn = iter_forever(actions)

        def work():
            env.step(next(turn))
            return rooms

        return work

    def whole(antialias):
        """Physics, reward and reset by the same kernel, but every picture is painted anew."""
        env = make(rooms, obs="state", oracle_steps=False)
        env.reset(seed=1)
        cameras, no_lines, turn = np.tile([0.5, 0.5, 0.0, 1.0], (rooms, 1)), np.zeros((rooms, 0, 4)), iter_forever(actions)
        world = env.rooms

        def work():
            env.step(next(turn))
            fast.draw_rooms(
                block, world.agent, world.heading, world.gold, world.gold_here, world.walls, cameras, fast.SHOW_ALL, antialias, no_lines, 0.0
            )
            return rooms

        return work

    return {
        "memset": fill,
        "zero-copy": environment(True, False),
        "zero-copy, hard-edged": environment(False, False),
        "copied": environment(True, True),
        "copied, hard-edged": environment(False, True),
        "whole repaint": whole(True),
        "whole repaint, hard-edged": whole(False),
    }


def iter_forever(items):
    while True:
        yield from items


def pygame_drawing(size: int, kind: str):
    """Circles, rotated wall surfaces and `array3d`, as one would write it with pygame; no physics at all."""
    import pygame

    pygame.display.init()
    surface = pygame.Surface((size, size))
    rooms = (levels.bare if kind == "bare" else levels.walls)(1, 64).to_levels()
    order = iter_forever(rooms)

    def draw(room):
        surface.fill((255, 255, 255))
        (x, y), heading = room["agent"], room["heading"]
        pygame.draw.circle(surface, (0, 255, 0), (x * size, y * size), AGENT_RADIUS * size)
        eye = ((x + EYE_AHEAD * math.cos(heading)) * size, (y + EYE_AHEAD * math.sin(heading)) * size)
        pygame.draw.circle(surface, (255, 0, 0), eye, EYE_RADIUS * size)
        for left, top, width, height, angle in room["walls"]:
            wall = pygame.Surface((max(1, width * size), max(1, height * size)), pygame.SRCALPHA)
            wall.fill((0, 0, 0))
            if angle:
                # pygame turns about the middle and grows the surface: put the corner back where it was
                middle = pygame.Vector2(width * size / 2, height * size / 2).rotate_rad(angle)
                wall = pygame.transform.rotate(wall, -math.degrees(angle))
                surface.blit(wall, wall.get_rect(center=(left * size + middle.x, top * size + middle.y)))
            else:
                surface.blit(wall, (left * size, top * size))
        for x, y in room["gold"]:
            pygame.draw.circle(surface, (255, 200, 0), (x * size, y * size), GOLD_RADIUS * size)
        return pygame.surfarray.array3d(surface)

    def work():
        for _ in range(8):
            draw(next(order))
        return 8

    return work, draw


def minigrid_renderer(size: int):
    """A step of MiniGrid's empty room of 8 × 8 cells and its full picture at the same size."""
    import gymnasium
    import minigrid

    minigrid.register_minigrid_envs() if "MiniGrid-Empty-8x8-v0" not in gymnasium.registry else None
    env = gymnasium.make("MiniGrid-Empty-8x8-v0").unwrapped
    env.reset(seed=0)
    actions = iter_forever([0, 2, 1, 2, 2, 0])

    def work():
        for _ in range(8):
            done = env.step(next(actions))[2:4]
            frame = env.get_frame(tile_size=size // 8)
            if any(done):
                env.reset()
        assert frame.shape == (size, size, 3)
        return 8

    return work


def measure(rounds: int = 9, slice_seconds: float = 0.1) -> tuple[dict, str]:
    """All figures, and their tables."""
    spilled_bytes = 4 * cache_bytes() + 2**24
    results, text = {}, []
    for kind in ("bare", "walls"):
        for size in SIZES:
            for block in ("cached", "spilled"):
                rooms = CACHED_ROOMS[size] if block == "cached" else spilled_bytes // (3 * size * size)
                contestants = engines(size, rooms, kind)
                if block == "cached":
                    contestants["pygame drawing"] = pygame_drawing(size, kind)[0]
                    if kind == "bare":
                        contestants["MiniGrid renderer"] = minigrid_renderer(size)
                rates = race(contestants, rounds, slice_seconds)
                key = f"{kind}, {size}×{size}, {block}"
                results[key] = {"rooms": rooms, "megabytes": round(rooms * 3 * size * size / 1e6, 1), "modes": {}}
                rows = []
                for name in contestants:
                    entry = {"per CPU second": round(median(rates[name])), "of memset": round(ratio(rates, name, "memset"), 3)}
                    hard = f"{name}, hard-edged"
                    entry["anti-aliased to hard-edged"] = round(ratio(rates, name, hard), 2) if hard in rates else None
                    for other in ("pygame drawing", "MiniGrid renderer"):
                        entry[f"times {other}"] = round(ratio(rates, name, other), 1) if other in rates else None
                    results[key]["modes"][name] = entry
                    rows.append([name] + [
                        f"{v:,}" if k == "per CPU second" else "" if v is None else f"{v:.0%}" if k.startswith(("of", "anti")) else f"{v:g}×"
                        for k, v in entry.items()
                    ])
                text.append(f"### {kind}, {size}×{size}, {rooms:,} rooms, {results[key]['megabytes']} MB ({block})\n")
                heads = ["", "pictures per CPU second", "of memset", "AA to hard", "× pygame", "× MiniGrid"]
                text.append(table(heads, rows) + "\n")
    return results, "\n".join(text)


def verdicts(results: dict) -> list[list[str]]:
    """Which mode reaches which target, worst case over kinds of room and sizes."""
    rows = []
    for mode in ("zero-copy", "copied", "whole repaint"):
        cached = [r["modes"][mode] for key, r in results.items() if key.endswith("cached")]
        spilled = [r["modes"][mode] for key, r in results.items() if key.endswith("spilled")]
        worst = {
            "times pygame": min(e["times pygame drawing"] for e in cached),
            "of memset, cached": min(e["of memset"] for e in cached),
            "of memset, spilled": min(e["of memset"] for e in spilled),
            "anti-aliased to hard-edged": min(e["anti-aliased to hard-edged"] for e in cached + spilled),
        }
        rows.append([mode] + [
            f"{worst[k]:g}× {'✓' if worst[k] >= t else '✗'}" if k == "times pygame" else f"{worst[k]:.0%} {'✓' if worst[k] >= t else '✗'}"
            for k, t in TARGETS.items()
        ])
    return rows


def main(quick: bool = False) -> tuple[dict, str]:
    results, text = measure(3, 0.03) if quick else measure()
    heads = ["worst case of the mode", "× pygame (≥ 40)", "of memset, cached (≥ 30%)", "of memset, spilled (≥ 75%)", "AA to hard (≥ 80%)"]
    explanation = (
        "A step of every room (physics, reward, time limit, automatic reset) and its picture, through `VectorEnv.step` with random "
        "actions and `oracle_steps=False`; one thread, CPU time, contestants in turn, medians of the ratios of each round. "
        "*Zero-copy* (`copy=False`) repaints what changed in the environment's own memory; *copied* is the default, which hands out a "
        "copy; *whole repaint* paints every picture from nothing. *memset* fills the same block. The pygame drawing has no physics.\n"
    )
    return results, explanation + "\n" + table(heads, verdicts(results)) + "\n\n" + text
