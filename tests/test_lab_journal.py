"""The journal: what is refused, and the journal of this repository itself."""
import json
from pathlib import Path

import pytest

from compute_layers.lab import commands
from compute_layers.lab.journal import JournalError, check_journal, close_entry, index_journal, new_entry, read_entry
from compute_layers.lab.runs import new_run


@pytest.fixture
def entry(tmp_path):
    run = new_run("demo", {}, seeds=[1], root=tmp_path)
    run.save_metrics({"accuracy": {"near": 0.9713, "per_seed": [0.97, 0.9726]}, "loss": 1.5e-4, "questions": 10_000, "good": True})
    path = new_entry(run.folder, "a-test", "Does it work?", "near is above 0.95", 0.8, verdict="confirmed", root=tmp_path)
    index_journal(tmp_path)
    return path


def rewrite(entry: Path, **fields) -> None:
    lines = entry.read_text().splitlines()
    for key, value in fields.items():
        lines = [f"{key}: {json.dumps(value)}" if line.startswith(f"{key}: ") else line for line in lines]
    entry.write_text("\n".join(lines) + "\n")


def test_an_entry_from_a_run_is_in_order(entry, tmp_path):
    assert check_journal(tmp_path) == 1
    fields = read_entry(entry).fields
    assert fields["result"] == "accuracy.near=0.9713, accuracy.per_seed.0=0.97, accuracy.per_seed.1=0.9726, loss=0.00015, questions=10000"
    assert fields["seeds"] == [1] and fields["metrics"] == f"journal/metrics/{entry.stem}.json"


@pytest.mark.parametrize("result", ["accuracy.near=0.97", "near is fine: accuracy.near = 97.1%, in 20 minutes", "loss=1.5e-4", "loss=0.0002, questions=10000"])
def test_roundings_of_metrics_are_backed(entry, tmp_path, result):
    rewrite(entry, result=result)
    index_journal(tmp_path)
    assert check_journal(tmp_path) == 1


@pytest.mark.parametrize("fields, message", [
    (dict(prediction=""), "has no prediction"),
    (dict(prediction=None), "has no prediction"),
    (dict(question=" "), "has no question"),
    (dict(probability=None), "no probability"),
    (dict(probability=80), "no probability"),
    (dict(probability=True), "no probability"),
    (dict(result="accuracy.near=0.972"), "claims accuracy.near=0.972, but journal/metrics/"),
    (dict(result="accuracy.near=98%"), "claims accuracy.near=98%"),
    (dict(result="accuracy.far=0.97"), "has no accuracy.far"),
    (dict(result="it works"), "without a single key=value claim"),
    (dict(result="questions=10000, nearly 99%"), "the number 99% in its result"),
    (dict(result="questions=10000, nearly 0.99 of it"), "the number 0.99 in its result"),
    (dict(result=""), "is closed, but has no result"),
    (dict(metrics=None), "no metrics file backs"),
    (dict(metrics="journal/metrics/other.json"), "no metrics file backs"),
    (dict(negative=True), "title does not say"),
    (dict(verdict="open"), "is open, but has a result"),
    (dict(verdict="great"), "has the verdict 'great'"),
])
def test_what_is_refused(entry, tmp_path, fields, message):
    rewrite(entry, **fields)
    with pytest.raises(JournalError, match=message):
        check_journal(tmp_path)


@pytest.mark.parametrize("old, new, message", [
    ("---\n", "", "head between two lines"),
    ('verdict: "confirmed"', "verdict: confirmed", "line 12: .*double quotes"),
    ('verdict: "confirmed"\n', "", "lacks the field 'verdict'"),
    ('verdict: "confirmed"', 'verdict: "confirmed"\nmood: 1', "unknown field 'mood'"),
    ('verdict: "confirmed"', 'verdict: "confirmed"\nverdict: "mixed"', "line 13"),
    ("# Does it work?", "", "has no title"),
    ("# Does it work?", "# Does it work? (negative)", "says \\(negative\\)"),
])
def test_broken_heads(entry, tmp_path, old, new, message):
    entry.write_text(entry.read_text().replace(old, new, 1))
    with pytest.raises(JournalError, match=message):
        check_journal(tmp_path)


def test_heads_are_yaml_too(entry):
    yaml = pytest.importorskip("yaml")
    rewrite(entry, question="naïve: \"a # b\" — 'yes'?\t- no")
    assert yaml.safe_load(entry.read_text().split("---")[1]) == read_entry(entry).fields


def test_predict_run_close_with_a_negative_result(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = compute_layers\n")
    monkeypatch.chdir(tmp_path)
    assert commands.main(["journal", "new", "no-luck", "--question", "Is more noise better?", "--prediction", "yes", "--probability", "0.6"]) == 0
    assert commands.main(["journal", "check"]) == 0
    run = new_run("demo", {}, root=tmp_path)
    close = ["journal", "close", "no-luck", str(run.folder), "--verdict", "refuted", "--negative", "--keys", "near"]
    assert commands.main(close) == 1  # no metrics yet
    run.save_metrics({"near": 0.5})
    assert commands.main([*close[:-1], "far"]) == 1
    assert not (tmp_path / "journal/metrics").exists()  # a refusal leaves nothing behind
    assert commands.main(close) == 0 and commands.main(close) == 1  # it is closed now
    assert commands.main(["journal", "check"]) == 0
    (path,) = (tmp_path / "journal").glob("*no-luck.md")
    assert "# Is more noise better? (negative)" in path.read_text()
    assert "0.360" in (tmp_path / "journal" / "README.md").read_text()  # Brier: (0.6 - 0)²
    with pytest.raises(JournalError, match="already"):
        close_entry(path, run.folder, "mixed")
    (tmp_path / "journal" / "notes.md").write_text("# Notes\n")
    with pytest.raises(JournalError, match="notes.md"):
        check_journal(tmp_path)


def test_a_stale_index_is_noticed(entry, tmp_path):
    rewrite(entry, prediction="near is above 0.9")
    with pytest.raises(JournalError, match="out of date"):
        check_journal(tmp_path)


def test_the_journal_of_this_repository():
    root = Path(__file__).resolve().parents[1]
    assert list((root / "journal").glob("2*.md"))
    check_journal(root)
