"""A fresh clone gets its weights from the store in the repository, byte for byte, and from a second remote."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What is committed, in a folder of its own."
    folder = tmp_path_factory.mktemp("fresh") / "a clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(folder)], check=True, timeout=120)
    return folder


def dvc(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    "DVC in the clone, with caches and settings of its own."
    home = clone.parent
    env = {**os.environ, "DVC_SITE_CACHE_DIR": str(home / "site"), "DVC_GLOBAL_CONFIG_DIR": str(home), "DVC_SYSTEM_CONFIG_DIR": str(home)}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=clone, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def manifest(clone: Path) -> dict[str, str]:
    "Path below data/ -> MD5, as data.dvc and the folder's listing in the store say."
    folder = re.search(r"md5: (\w+)\.dir", (clone / "data.dvc").read_text(encoding="utf8"))[1]
    listing = (clone / "dvc-store" / "files" / "md5" / folder[:2] / f"{folder[2:]}.dir").read_bytes()
    assert md5(listing) == folder
    return {entry["relpath"]: entry["md5"] for entry in json.loads(listing)}


def on_disk(clone: Path) -> dict[str, str]:
    files = [p for p in (clone / "data").rglob("*") if p.is_file()]
    return {p.relative_to(clone / "data").as_posix(): md5(p.read_bytes()) for p in files}


def test_pull_restores_every_byte(clone: Path) -> None:
    assert (clone / "data.dvc").is_file(), "no data.dvc is committed: `dvc add data`, `dvc push`, and commit data.dvc and dvc-store/"
    assert not (clone / "data").exists()
    dvc(clone, "pull")
    wanted = manifest(clone)
    assert "weights/tiny/weights.safetensors" in wanted
    assert on_disk(clone) == wanted
    assert subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout == ""
    if (ROOT / "data.dvc").read_bytes() == (clone / "data.dvc").read_bytes():
        assert on_disk(ROOT) == wanted, "data/ here is not what data.dvc says: `dvc pull`"


def test_second_remote_as_the_readme_says(clone: Path) -> None:
    disk = clone.parent / "disk"
    dvc(clone, "pull")
    wanted = on_disk(clone)
    dvc(clone, "remote", "add", "--local", "disk", str(disk))
    dvc(clone, "push", "-r", "disk")
    shutil.rmtree(clone / "data")
    shutil.rmtree(clone / ".dvc" / "cache")
    shutil.move(clone / "dvc-store", clone.parent / "store elsewhere")
    try:
        dvc(clone, "pull", "-r", "disk")
        assert on_disk(clone) == wanted
    finally:
        shutil.move(clone.parent / "store elsewhere", clone / "dvc-store")


def test_store_and_settings_are_portable() -> None:
    config = (ROOT / ".dvc" / "config").read_text(encoding="utf8")
    assert "url = ../dvc-store" in config and "analytics = false" in config
    assert "dvc-store/** -text -diff" in (ROOT / ".gitattributes").read_text(encoding="utf8")
