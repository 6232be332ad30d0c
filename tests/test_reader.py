"""The reader of pictures: what it refuses, and the forms of picture it takes alike."""

import subprocess
import sys

import numpy as np
import pytest

from compute_layers.game import levels
from compute_layers.game.picture import draw
from compute_layers.game.reader import read_picture

ROOMS = levels.walls(seed=levels.HELD_OUT_SEED + 1, n=4)


@pytest.mark.parametrize(
    "pictures, words",
    [
        (np.zeros((64, 64, 3), np.uint8), r"\(64, 64, 3\)"),
        (np.zeros((2, 3, 64, 64), np.uint8), r"uint8 .*\(2, 3, 64, 64\)"),
        (np.zeros((2, 64, 60, 3), np.uint8), r"\(2, 64, 60, 3\)"),
        (np.zeros((2, 64, 64, 3), np.float32), r"float32 .*\(2, 64, 64, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "at least 16"),
        (np.zeros((2, 64, 64, 3), np.int64), "int64"),
        (np.full((2, 3, 64, 64), np.nan), "finite"),
        (np.full((2, 3, 64, 64), 255.0), r"\[0, 1\]"),
        ([["a"]], "dtype"),
    ],
)
def test_other_pictures_are_refused_by_name(pictures, words):
    with pytest.raises(ValueError, match=words):
        read_picture(pictures)


@pytest.mark.parametrize("counts", [{"max_gold": -1}, {"max_walls": 2.5}, {"max_gold": True}])
def test_counts_are_whole_numbers(counts):
    with pytest.raises(ValueError, match=next(iter(counts))):
        read_picture(draw(ROOMS), **counts)


def test_bytes_floats_and_tensors_give_the_same_reading():
    torch = pytest.importorskip("torch")
    pictures = draw(ROOMS)
    floats = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
    want = read_picture(pictures)
    for same in (floats, floats.astype(np.float64), torch.as_tensor(floats), torch.as_tensor(pictures), pictures[:, ::1].copy(order="F")):
        got = read_picture(same)
        assert (got.world.agent == want.world.agent).all() and (got.world.walls == want.world.walls).all()
        assert (got.confidence == want.confidence).all()


def test_shapes_follow_the_counts():
    reading = read_picture(draw(ROOMS), max_gold=3, max_walls=0)
    assert reading.world.gold.shape == (4, 3, 2) and reading.world.walls.shape == (4, 0, 5)
    assert (reading.world.gold_here.sum(1) == ROOMS.gold_here.sum(1)).all()
    assert read_picture(draw(ROOMS), max_gold=0, max_walls=3).world.walls.shape == (4, 3, 5)
    assert len(read_picture(np.zeros((0, 64, 64, 3), np.uint8)).world) == 0


def test_no_agent_leaves_a_room_that_can_be_painted():
    reading = read_picture(np.full((2, 64, 64, 3), 255, np.uint8))
    assert not reading.agent_seen.any() and (reading.world.agent == 0.5).all()
    assert draw(reading.world).shape == (2, 64, 64, 3)


def test_the_reader_does_not_import_torch():
    program = "import sys, compute_layers.game.reader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
