"""Weights folders: damage of every kind is named, and promotion into data/ loses nothing."""
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compute_layers.lab.weights import WeightsError, fallen, fit_weights, promote, read_description, read_weights, save_weights, weights_line


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def folder(tmp_path):
    return save_weights(tmp_path / "small", make_net(), {"preset": "small"}, {"vocab.json": '["gold"]', "raw.bin": b"\r\n\0"})


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "vocab.json"])
def test_every_flipped_byte_is_named(folder, name):
    whole = (folder / name).read_bytes()
    good = read_weights(folder)
    for place in range(0, len(whole), 3 if name == "config.json" else 1):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / name).write_bytes(changed)
        try:
            again = read_weights(folder)
        except WeightsError as error:
            assert name in str(error)
        else:  # only white space between JSON's words may change without changing what it says
            assert name == "config.json" and json.loads(changed) == json.loads(whole) and again[1] == good[1]


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "vocab.json", "raw.bin"])
def test_truncated_or_missing_files_are_named(folder, name):
    whole = (folder / name).read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 2}:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=name):
            read_weights(folder)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name}: missing"):
        read_weights(folder)


def reseal(folder: Path, change) -> None:
    "Change config.json and put its own hash right, as a forger or a buggy tool would."
    from compute_layers.lab.weights import _self_hash

    content = json.loads((folder / "config.json").read_text())
    change(content)
    content["sha256"] = _self_hash(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_a_file_that_is_whole_but_holds_other_tensors(folder, tmp_path):
    other = save_weights(tmp_path / "other", {"0.weight": torch.zeros(4, 3).half(), "x": torch.zeros(1)}, {})
    shutil.copy(other / "weights.safetensors", folder / "weights.safetensors")
    reseal(folder, lambda content: content["files"].update({"weights.safetensors": read_description(other)["files"]["weights.safetensors"]}))
    with pytest.raises(WeightsError, match=r"missing tensors 0.bias, .* and 3 more; unexpected tensor x; .*tensor 0.weight is float16 \(4, 3\) where float32"):
        read_weights(folder)


def test_not_a_safetensors_file_and_another_format(folder):
    junk = b"PK\x03\x04 not tensors at all"
    (folder / "weights.safetensors").write_bytes(junk)
    reseal(folder, lambda content: content["files"].update({"weights.safetensors": {"sha256": hashlib.sha256(junk).hexdigest(), "bytes": len(junk)}}))
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_weights(folder)
    reseal(folder, lambda content: content.update(format="something else"))
    with pytest.raises(WeightsError, match="config.json: not of the format"):
        read_weights(folder)


def test_a_model_takes_all_or_nothing(folder):
    tensors, config = read_weights(folder)
    assert config == {"preset": "small"}
    model = make_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {name: value for name, value in tensors.items() if name != "2.bias"}
    for wrong, message in ((bad, "missing tensor 2.bias"), (tensors | {"y": torch.zeros(1)}, "unexpected tensor y"),
                           (tensors | {"2.bias": torch.zeros(3)}, r"2.bias is float32 \(3,\) where float32 \(2,\)"),
                           (tensors | {"2.bias": torch.zeros(2).double()}, "2.bias is float64")):
        with pytest.raises(WeightsError, match=message):
            fit_weights(model, wrong)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fit_weights(model, tensors)
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_saving_never_replaces_unless_asked(folder):
    with pytest.raises(FileExistsError):
        save_weights(folder, make_net(), {})
    with pytest.raises(TypeError):
        save_weights(folder, make_net(), {"x": object()}, replace=True)
    assert read_weights(folder)[1] == {"preset": "small"}
    save_weights(folder, make_net(), {"preset": "new"}, replace=True)
    assert read_weights(folder)[1] == {"preset": "new"} and not (folder / "vocab.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    (folder.parent / "notes").mkdir()
    with pytest.raises(FileExistsError, match="not a weights folder"):
        save_weights(folder.parent / "notes", make_net(), {}, replace=True)
    assert weights_line(folder).startswith("weights small: ")


# Promotion, in a checkout made for the test.

def tool(root: Path, *command: str) -> str:
    command = (sys.executable, "-m", "dvc", *command[1:]) if command[0] == "dvc" else command
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(root: Path) -> None:
    tool(root, "git", "add", "-A")
    tool(root, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "step")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A repository with DVC set up as in this one, and two weights promoted and committed."
    pytest.importorskip("dvc")
    here = Path(__file__).resolve().parents[1]
    root = tmp_path_factory.mktemp("promotion") / "repo"
    (root / ".dvc").mkdir(parents=True)
    shutil.copy(here / ".dvc" / "config", root / ".dvc" / "config")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / ".gitattributes").write_text("dvc-store/** -text -diff\n")
    (root / "settings.ini").write_text("[DEFAULT]\nlib_name = compute_layers\n")
    tool(root, "git", "init", "-q")
    (root / "dvc-store").mkdir()
    run = root.parent / "run"
    save_weights(run / "weights", make_net(), {"version": 1}, {"vocab.json": "[]\r\n"})
    (run / "weights" / "scratch.tmp").write_text("does not belong to the weights")
    assert promote(run, "tiny", root=root, push=False) == root / "data" / "weights" / "tiny"
    save_weights(run.parent / "run2" / "weights", make_net(), {"version": 2})
    promote(run.parent / "run2", "second", root=root)
    commit(root)
    return root


def clone(checkout: Path, to: Path) -> Path:
    tool(checkout, "git", "clone", "-q", str(checkout), str(to))
    return to


def test_promoted_weights_come_back_byte_for_byte(checkout, tmp_path):
    fresh = clone(checkout, tmp_path / "fresh")
    tool(fresh, "dvc", "pull", "-q")
    for name in ("tiny", "second"):
        files = sorted(path.name for path in (fresh / "data" / "weights" / name).iterdir())
        assert files == sorted(path.name for path in (checkout / "data" / "weights" / name).iterdir()) and "scratch.tmp" not in files
        for file in files:
            assert (fresh / "data" / "weights" / name / file).read_bytes() == (checkout / "data" / "weights" / name / file).read_bytes()
        read_weights(fresh / "data" / "weights" / name)


def test_a_partial_checkout_is_refused(checkout, tmp_path):
    partial = clone(checkout, tmp_path / "partial")
    tool(partial, "dvc", "pull", "-q", "data/weights/tiny")
    before = (partial / "data.dvc").read_bytes()
    run = tmp_path / "run"
    save_weights(run / "weights", make_net(), {"version": 3})
    with pytest.raises(WeightsError, match=r"partial: 2 files .*second.*dvc pull"):
        promote(run, "third", root=partial)
    assert (partial / "data.dvc").read_bytes() == before and not (partial / "data" / "weights" / "third").exists()

    tool(partial, "dvc", "pull", "-q")
    with pytest.raises(FileExistsError):
        promote(run, "tiny", root=partial)
    promote(run, "tiny", root=partial, replace=True)  # vocab.json of the old one is gone, everything else stays
    commit(partial)
    fresh = clone(partial, tmp_path / "fresh")
    tool(fresh, "dvc", "pull", "-q")
    assert [read_weights(fresh / "data" / "weights" / name)[1]["version"] for name in ("tiny", "second")] == [3, 2]
    assert sorted(path.name for path in (fresh / "data" / "weights" / "tiny").iterdir()) == ["config.json", "weights.safetensors"]


def test_damaged_weights_are_not_promoted(checkout, tmp_path):
    before = (checkout / "data.dvc").read_bytes()
    save_weights(tmp_path / "run" / "weights", make_net(), {})
    path = tmp_path / "run" / "weights" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        promote(tmp_path / "run", "bad", root=checkout)
    assert (checkout / "data.dvc").read_bytes() == before and not (checkout / "data" / "weights" / "bad").exists()


def test_when_dvc_fails_the_copy_is_taken_back(checkout, tmp_path, monkeypatch):
    import compute_layers.lab.weights as module

    real = module._run_tool
    monkeypatch.setattr(module, "_run_tool", lambda root, *command: (_ for _ in ()).throw(WeightsError("no space")) if "add" in command else real(root, *command))
    save_weights(tmp_path / "run" / "weights", make_net(), {"version": 9})
    old = (checkout / "data" / "weights" / "tiny" / "weights.safetensors").read_bytes()
    with pytest.raises(WeightsError, match="no space"):
        promote(tmp_path / "run", "tiny", root=checkout, replace=True)
    assert (checkout / "data" / "weights" / "tiny" / "weights.safetensors").read_bytes() == old
    assert not list(checkout.glob(".tiny*"))


def test_what_has_forgotten_is_not_promoted_by_accident(checkout, tmp_path):
    before = {"near": {"accuracy": 0.99, "low": 0.98}, "turn": {"accuracy": 0.9, "low": 0.85}}

    def weights(name: str, ledger: dict | None):
        files = {"ledger.json": json.dumps(ledger)} if ledger is not None else {}
        return save_weights(tmp_path / name / "weights", {"w": torch.ones(2)}, {"kind": "test"}, files=files).parent

    promote(weights("first", before), "raised", root=checkout, push=False)
    kept = (checkout / "data/weights/raised/ledger.json").read_bytes()
    for name, ledger, words in (
        ("fell", {**before, "near": {"accuracy": 0.5, "low": 0.4}}, "near .99.0% before, 50.0% now"),
        ("lacks", {"near": before["near"]}, "turn .*not examined"),
        ("none", None, "all of them"),
    ):
        with pytest.raises(WeightsError, match=words):
            promote(weights(name, ledger), "raised", replace=True, root=checkout, push=False)
        assert (checkout / "data/weights/raised/ledger.json").read_bytes() == kept
    better = {"near": {"accuracy": 0.985, "low": 0.98}, "turn": {"accuracy": 0.95, "low": 0.9}, "more": {"accuracy": 0.5, "low": 0.4}}
    promote(weights("better", better), "raised", replace=True, root=checkout, push=False)
    promote(weights("allowed", {}), "raised", replace=True, root=checkout, push=False, forgetting=True)


def test_a_run_that_forgot_is_not_promoted_under_another_name_either(checkout, tmp_path):
    run = save_weights(tmp_path / "run" / "weights", {"w": torch.ones(2)}, {"kind": "test"}).parent
    (run / "metrics.json").write_text(json.dumps({"fallen": {"count": 1, "names": ["near"]}}))
    for folder in (run, run / "weights"):
        with pytest.raises(WeightsError, match="near .as its run says.*--forgetting"):
            promote(folder, "another", root=checkout, push=False)
    assert not (checkout / "data/weights/another").exists()
    promote(run, "another", root=checkout, push=False, forgetting=True)
    (run / "metrics.json").write_text(json.dumps({"fallen": {"count": 0, "names": []}}))
    promote(run, "a-third", root=checkout, push=False)
    (run / "metrics.json").write_text('{"fallen": ')  # torn: that is no sign that nothing fell
    with pytest.raises(WeightsError, match="cannot be read.*--forgetting"):
        promote(run, "a-fourth", root=checkout, push=False)


def test_what_was_at_zero_cannot_fall() -> None:
    "A lower end that rounding left a hair above zero once flagged skills that nobody ever had."
    assert fallen({"zoom": {"accuracy": 0.0, "low": 1e-19}}, {"zoom": {"accuracy": 0.0}}) == []
    assert fallen({"zoom": {"accuracy": 0.5, "low": 0.4}}, {"zoom": {"accuracy": 0.39}}) == ["zoom"]
