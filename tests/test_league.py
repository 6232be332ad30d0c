"""The league keeps its word: an honest zero, repeatable numbers, evidence that cannot be changed, and bad minds that hurt only themselves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from compute_layers.league import anchors
from compute_layers.league import arena as arenas
from compute_layers.league import evidence, play, score, season
from compute_layers.league.meter import valgrind
from compute_layers.minds.mind import MAKERS, Mind, load_mind
from compute_layers.minds.mind import play as play_plainly
from compute_layers.minds.reflexes import Constant, Odds

ROOT = Path(__file__).parent.parent
ANCHORS = arenas.read_anchors()
arenas.import_all("league", "arena_"), arenas.import_all("minds")
CORE = season.arenas_of("cpu")
HERE = [name for name in CORE if arenas.available(arenas.ARENAS[name])]
EXAM = list(range(arenas.EXAM_SEEDS, arenas.EXAM_SEEDS + 20))


# ---------------------------------------------------------------------------------------------------------------------
# the zero and the one


def test_every_arena_is_there_and_declared() -> None:
    assert len(CORE) == 12 and set(CORE) < set(season.arenas_of("gpu")) == set(ANCHORS)


@pytest.mark.parametrize("name", HERE)
def test_constants_score_no_more_than_zero(name: str) -> None:
    arena = arenas.get_arena(name, ANCHORS)
    for action in range(len(arena.actions)):
        returns = play_plainly(arena, Constant(action), EXAM[: 20 if arena.steps <= 200 and len(arena.actions) <= 5 else 10])
        result = score.score(returns, arena)
        assert result.low <= 0, f"always {arena.actions[action]} scores {result.score:.2f} (at least {result.low:.2f})"


@pytest.mark.parametrize("name", HERE)
def test_the_reference_scores_one(name: str) -> None:
    arena = arenas.get_arena(name, ANCHORS)
    reference = arena.facts["reference"]
    if "mind" not in reference:  # a figure: what it must be worth is 1, and no return of a trivial mind may reach it
        assert score.score([reference["return"]] * 10, arena).score == pytest.approx(1)
        assert score.score(play_plainly(arena, Odds([1.0] * len(arena.actions)), EXAM[:10]), arena).high < 1
        return
    mind, _ = MAKERS[reference["mind"]].make(arena, 1.0, 0)
    result = score.score(play_plainly(arena, mind, EXAM), arena)
    assert result.low - 0.02 <= 1 <= result.high + 0.02, result


HEAVY = {"atari-freeway": 2048, "atari-pong": 1000, "atari-breakout": 400, "atari-robotank": 120, "crafter": 300}  # decisions of a quick look
WHOLE = os.environ.get("CONSTANTS") == "whole"  # every constant plays whole episodes: half an hour and more


@pytest.mark.parametrize("name", HEAVY)
def test_the_heavy_arenas_have_an_honest_zero_too(name: str) -> None:
    "Their episodes are long. In a quick look each constant plays the beginning of one; with CONSTANTS=whole those that look good play ten to the end."
    if not arenas.available(arenas.ARENAS[name]):
        pytest.skip("its package is not installed")
    arena = arenas.get_arena(name, ANCHORS)
    zero, one = arena.facts["trivial"], arena.facts["reference"]
    assert one["return"] > zero["return"] and score.score([one["return"]] * 10, arena).score == pytest.approx(1)
    assert zero["searched"]["candidates"] > len(arena.actions), "every constant was a candidate"
    assert zero["seeds_from"] != zero["searched"]["seeds_from"], "measured on seeds on which it was not chosen"
    env = arena.make("state")

    def earned(action: int, seed: int) -> float:
        env.reset(seed=seed)
        total, most = 0.0, arena.steps if WHOLE and name != "atari-breakout" else HEAVY[name]  # nobody earns anything in Breakout who does not serve, or serves and stands still
        for _ in range(most):
            _, reward, terminated, truncated, _ = env.step(action)
            total += reward
            if terminated or truncated:
                break
        return total

    for action in range(len(arena.actions)):
        first = [earned(action, seed) for seed in EXAM[: 2 if WHOLE else 1]]
        if score.normalised([np.mean(first)], arena)[0] <= 0:
            continue
        result = score.score([*first, *(earned(action, seed) for seed in EXAM[len(first) : 10])], arena)
        assert result.low <= 0, f"always {arena.actions[action]} scores {result.score:.2f} (at least {result.low:.2f}), the zero is {zero['return']}"


def test_the_command_of_the_house_reaches_the_league(capsys: pytest.CaptureFixture) -> None:
    from compute_layers.lab import commands

    assert "league" in commands.room_programs()
    assert commands.main(["league", "list", "--preset", "smoke"]) == 0
    assert "cartpole: always 1, random, open loop, rules" in capsys.readouterr().out
    assert commands.main(["league", "verify", "nowhere"]) == 1


def test_standings_can_be_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compute_layers.lab import commands

    monkeypatch.setattr(season, "STANDINGS", str(tmp_path / "standings.json"))
    season.write_standings([{"arena": "cartpole", "mind": "rules", "instructions": 1}, {"arena": "elsewhere", "mind": "rules", "instructions": 2}])
    (folder := tmp_path / "season").mkdir()
    season._write(folder / "cartpole--rules.json", {"arena": "cartpole", "mind": "rules", "instructions": 3, "episodes": [{}], "real_time": {"delay": 1, "score": 0.5, "played": [{}]}})
    assert commands.main(["league", "standings", "--add", str(folder)]) == 0
    rows = json.loads((tmp_path / "standings.json").read_text())
    assert [(row["arena"], row["mind"]) for row in rows] == [("cartpole", "rules"), ("elsewhere", "rules")] and rows[1]["instructions"] == 2
    assert rows[0] == {"arena": "cartpole", "mind": "rules", "instructions": 3, "exam": 1, "real_time": {"delay": 1, "score": 0.5}}


def test_an_arena_without_anchors_is_refused() -> None:
    with pytest.raises(ValueError, match="has no anchors.*declare them first"):
        arenas.get_arena("cartpole", {})


# ---------------------------------------------------------------------------------------------------------------------
# two leagues


@pytest.fixture(scope="module")
def two_leagues(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[dict]]]:
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"season{number}")
        found.append((folder, season.run_season(folder, "smoke", arenas=["cartpole"], minds=["always 1", "random", "rules"], episodes=5)))
    return found


def test_two_smoke_leagues_give_the_same_scores(two_leagues) -> None:
    (first, rows), (second, again) = two_leagues
    assert [r["score"] for r in rows] == [r["score"] for r in again]
    assert (first / evidence.HEAD).read_text() == (second / evidence.HEAD).read_text()


@pytest.mark.skipif(valgrind() is None, reason="valgrind is not installed")
def test_two_smoke_leagues_count_the_same_instructions(two_leagues) -> None:
    (_, rows), (_, again) = two_leagues
    for one, other in zip(rows, again):
        assert one["instructions"] == pytest.approx(other["instructions"], rel=1e-3), one["mind"]
    by_name = {r["mind"]: r["instructions"] for r in rows}
    assert 0 < by_name["always 1"] < by_name["rules"]


def test_several_processes_play_the_same_season(tmp_path: Path) -> None:
    """Pairs, and those that play again against the clock: one process or two, the same rows."""
    wanted = (["cartpole"], ["random", "rules"])
    for folder, workers in (("one", 1), ("two", 2)):
        rows = season.run_season(tmp_path / folder, "smoke", *wanted, episodes=3, meter=False, workers=workers)
        for row in rows:  # as if it had been counted: each thinks for a second
            row |= {"instructions": season.CLOCK_RATE, "instructions_source": "a test"}
            season._write(tmp_path / folder / f"{season._slug(row['arena'], row['mind'])}.json", row)
    one, two = (season.run_season(tmp_path / folder, "smoke", *wanted, episodes=3, workers=workers) for folder, workers in (("one", 1), ("two", 2)))
    assert [row["mind"] for row in two] == ["random", "rules"]
    for name in ("episodes", "score", "real_time"):
        assert [row[name] for row in one] == [row[name] for row in two]
    assert two[1]["real_time"]["delay"] == 50 and two[1]["real_time"]["score"] < two[1]["score"]["score"]
    late = [record for line in (tmp_path / "two" / evidence.FILE).read_text().splitlines() if "delay" in (record := json.loads(line))]
    assert {record["delay"] for record in late} == {50} and [record["returned"] for record in late[3:]] == [e["returned"] for e in two[1]["real_time"]["played"]]
    assert evidence.verify(tmp_path / "two")["replayed"] == 12, "what was played against the clock is played again, too"


def test_a_season_goes_on_where_it_died(two_leagues) -> None:
    folder, rows = two_leagues[0]
    pair = folder / "cartpole--rules.json"
    before = pair.stat().st_mtime_ns, (folder / evidence.HEAD).read_text()
    (folder / "cartpole--random.json").unlink()
    again = season.run_season(folder, "smoke", arenas=["cartpole"], minds=["always 1", "random", "rules"], episodes=5, meter=False)
    assert [r["score"] for r in again] == [r["score"] for r in rows]
    assert (pair.stat().st_mtime_ns, (folder / evidence.HEAD).read_text()) == before


# ---------------------------------------------------------------------------------------------------------------------
# evidence


def verify_command(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "compute_layers.league", "verify", str(folder)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)


def test_a_changed_byte_fails_the_verification(two_leagues) -> None:
    folder = two_leagues[1][0]
    done = verify_command(folder)
    assert done.returncode == 0 and "15 episodes" in done.stdout, done.stderr
    rng = np.random.default_rng(0)
    for file in (evidence.FILE, evidence.HEAD):
        whole = (folder / file).read_bytes()
        for place in rng.integers(len(whole), size=12):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(rng.integers(7))
            (folder / file).write_bytes(changed)
            with pytest.raises(evidence.EvidenceError):
                evidence.verify(folder)
        (folder / file).write_bytes(whole)
    (folder / evidence.HEAD).write_text("0" * 64 + "\n")
    done = verify_command(folder)
    assert done.returncode == 1 and "another end" in done.stderr


def test_a_forged_chain_fails_in_the_replay(two_leagues, tmp_path: Path) -> None:
    "Whoever recomputes every hash still cannot claim a return that the actions do not give."
    rows = two_leagues[0][1]
    episodes = [play.Episode(**e) for e in rows[0]["episodes"]]
    episodes[2].returned += 1
    episodes[2].raw += 1
    evidence.write_evidence(tmp_path, [("cartpole", "liar", "state", episodes)])
    with pytest.raises(evidence.EvidenceError, match="line 3.*'liar'.*the record says"):
        evidence.verify(tmp_path)


def test_a_score_that_no_episode_gave_fails_the_verification(two_leagues, tmp_path: Path) -> None:
    shutil.copytree(two_leagues[0][0], tmp_path / "season")
    evidence.verify(tmp_path / "season")
    file = tmp_path / "season" / "cartpole--random.json"
    row = json.loads(file.read_text())
    row["score"]["score"] += 0.1
    file.write_text(json.dumps(row))
    with pytest.raises(evidence.EvidenceError, match="cartpole--random.json: it says a score of"):
        evidence.verify(tmp_path / "season")


# ---------------------------------------------------------------------------------------------------------------------
# one file each


def test_a_new_arena_and_a_new_mind_are_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Nothing of the house is changed: the arena gets its anchors by the usual command and plays in the league of its preset, with whoever fits."
    import compute_layers.league
    import compute_layers.minds

    (tmp_path / "league").mkdir(), (tmp_path / "minds").mkdir()
    (tmp_path / "league" / "arena_short_pole.py").write_text(
        "import gymnasium\nfrom compute_layers.league.arena import register_arena\nfrom compute_layers.minds.mind import Arena\n"
        "register_arena(Arena('short-pole', 'keep a pole upright for a while', lambda view: gymnasium.make('CartPole-v1', max_episode_steps=60), ('left', 'right'), 60, 0.0, 50.0,\n"
        "                     facts={'family': 'cartpole', 'reference': {'return': 60.0, 'kind': 'maximum', 'source': 'it is cut after 60'}}))\n")
    (tmp_path / "minds" / "leaner.py").write_text(
        "import numpy as np\nfrom compute_layers.minds.mind import Cost, Maker, Mind, register\n\n\nclass Leaner(Mind):\n    def act(self, seen):\n        return (seen[:, 2] > 0).astype(np.int64)\n\n\n"
        "register(Maker('leaner', 'rule', 'state', 'which number is the lean', lambda arena: arena.name == 'short-pole', lambda arena, effort, seed: (Leaner(), Cost(design_lines=2)), presets=('cpu',)))\n")
    monkeypatch.setattr(compute_layers.league, "__path__", [*compute_layers.league.__path__, str(tmp_path / "league")])
    monkeypatch.setattr(compute_layers.minds, "__path__", [*compute_layers.minds.__path__, str(tmp_path / "minds")])
    monkeypatch.setattr(arenas, "ANCHORS_FILE", str(tmp_path / "anchors.json"))
    try:
        anchors.declare(["short-pole"], tmp_path / "anchors.json", candidates=12, episodes=2, finalists=2, final_episodes=4, measured_episodes=8)
        pairs = season.pairs_of("cpu", ["short-pole"])
        assert {("short-pole", "leaner"), ("short-pole", "rules"), ("short-pole", "random"), ("short-pole", "CMA-ES")} <= set(pairs)
        assert "short-pole" in season.arenas_of("cpu") and [pair for pair in season.pairs_of("cpu") if pair[0] == "short-pole"] == pairs
        rows = season.run_season(tmp_path / "season", "cpu", ["short-pole"], ["leaner", "random"], episodes=5, meter=False)
        assert rows[0]["score"]["lost"] == 0 and rows[0]["score"]["score"] > rows[1]["score"]["score"]
    finally:
        arenas.ARENAS.pop("short-pole", None), MAKERS.pop("leaner", None)
        sys.modules.pop("compute_layers.league.arena_short_pole", None), sys.modules.pop("compute_layers.minds.leaner", None)


# ---------------------------------------------------------------------------------------------------------------------
# bad minds


class Crashes(Mind):
    def act(self, observations):
        raise RuntimeError("out of ideas")


class Hangs(Mind):
    def act(self, observations):
        time.sleep(60)


class Cheats(Mind):
    def act(self, observations):
        return np.full(len(observations), 2)


class Dreams(Mind):
    def act(self, observations):
        return np.full(len(observations), np.nan)


class Mumbles(Mind):
    def act(self, observations):
        return np.zeros((len(observations), 2))


class Dies(Mind):
    def act(self, observations):
        os.kill(os.getpid(), signal.SIGKILL)


class CrashesOnce(Mind):
    "Only in the episode of seed 7; the neighbours must not suffer."

    def act(self, observations):
        if self.seed <= 7 < self.seed + self.n:
            raise RuntimeError("seven!")
        return np.ones(len(observations), int)


@pytest.mark.parametrize("bad, why", [(Crashes, "crash: RuntimeError: out of ideas"), (Hangs, "hang: no decision within"), (Cheats, "illegal action: 2 is outside 0 … 1"),
                                      (Dreams, "illegal action: NaN"), (Mumbles, "illegal action: act gave shape"), (Dies, "crash: the process died with status -9")])
def test_a_bad_mind_loses_its_episodes_and_nothing_else(bad, why) -> None:
    episodes = play.play_guarded(arenas.ARENAS["cartpole"], bad(), [5, 6], limit=0.4)
    assert [e.seed for e in episodes] == [5, 6]
    for episode in episodes:
        assert episode.lost.startswith(why) and episode.returned == arenas.ARENAS["cartpole"].worst


def test_only_the_guilty_episode_is_lost() -> None:
    episodes = play.play_guarded(arenas.ARENAS["cartpole"], CrashesOnce(), [5, 6, 7, 8])
    assert [bool(e.lost) for e in episodes] == [False, False, True, False]
    alone = play.play_guarded(arenas.ARENAS["cartpole"], Constant(1), [8])
    assert episodes[3].digest == alone[0].digest


# ---------------------------------------------------------------------------------------------------------------------
# what a row says

def test_a_row_tells_energy_and_time_with_their_source(two_leagues) -> None:
    for row in two_leagues[0][1]:
        assert row["energy"]["measured"] == (not row["energy"]["source"].startswith("model")), "what is modelled is not called measured"
        assert row["latency"]["p50"] <= row["latency"]["p95"] <= row["latency"]["p99"]
        assert row["hardware_instructions"] is None and "not counted" in row["hardware_source"] or row["hardware_instructions"] > 0


@pytest.mark.skipif(valgrind() is None, reason="valgrind is not installed")
def test_the_cpu_counts_what_callgrind_counts(two_leagues) -> None:
    for row in two_leagues[0][1]:
        if row["hardware_instructions"] is None:
            pytest.skip(row["hardware_source"])
        assert row["hardware_instructions"] == pytest.approx(row["instructions"], rel=0.1), row["mind"]


def test_a_brain_is_billed_for_its_weights_and_its_arithmetic(tmp_path: Path) -> None:
    if not MAKERS["brain"].fits(arenas.ARENAS["goldroom-bare"]):
        pytest.skip("the weights are not here: dvc pull")
    chosen = dataclasses.replace(season.PRESETS["smoke"], slow_episodes=1)
    row = season.play_pair(tmp_path, arenas.get_arena("goldroom-bare", ANCHORS), MAKERS["brain that answers"], chosen, 0)
    assert row["bytes"] > 1e6 and row["cost"]["cpu_seconds"] > 1000 and row["machine"]
    assert row["flops"] > 1e6 and row["flops_source"] == "counted by FlopCounterMode"


def test_calling_a_dearer_mind_takes_the_cheapest_that_is_nearly_best() -> None:
    from compute_layers.league.lower import call
    from compute_layers.minds.rules import Rule
    from compute_layers.minds.tables import record
    from compute_layers.minds.trees import grow_tree

    arena = arenas.get_arena("cartpole", ANCHORS)
    states, actions, _ = record(arena, Rule("cartpole"), 400)
    cheap = grow_tree(states, actions, 2, leaves=3)
    best, tried = call(cheap, Rule("cartpole"), arena, range(500_000, 500_005), states, (10.0, 100.0), (0.0, 0.95, 1.01))
    assert [row["called"] for row in tried] == sorted(row["called"] for row in tried) and (tried[0]["called"], tried[-1]["called"]) == (0, 1)
    assert (tried[0]["price"], tried[-1]["price"]) == (10.0, 110.0) and tried[-1]["score"].score == 1
    kept = next(row for row in tried if row["threshold"] == best.threshold)
    assert kept["score"].score >= 0.95 and all(row["price"] >= kept["price"] for row in tried if row["score"].score >= 0.95)


def test_a_cascade_asks_the_same_dice_in_a_batch_and_alone() -> None:
    from compute_layers.league.lower import Cascade
    from compute_layers.minds.trees import grow_tree

    states = np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32)
    cheap = grow_tree(states, (states[:, 2] > 0).astype(int), 2, leaves=4)
    cheap.purity = np.where(np.arange(len(cheap.purity)) % 2, 0.2, 1.0)  # unsure in half of its leaves
    mind = Cascade(cheap, Odds([1.0, 1.0]), 0.5)
    together = play.play_guarded(arenas.ARENAS["cartpole"], mind, [30, 31, 32])
    alone = play.play_guarded(arenas.ARENAS["cartpole"], mind, [32])
    assert together[2] == alone[0]


# ---------------------------------------------------------------------------------------------------------------------
# minds


@pytest.mark.parametrize("mind", [Constant(1), Odds([1.0, 2.0]), Odds([1.0, 1.0], stay=0.7)], ids=repr)
def test_a_row_plays_as_it_would_alone(mind) -> None:
    together = play.play_guarded(arenas.ARENAS["cartpole"], mind, [30, 31, 32])
    alone = play.play_guarded(arenas.ARENAS["cartpole"], mind, [32])
    assert together[2] == alone[0]


def test_a_mind_comes_back_from_its_file(two_leagues) -> None:
    folder, rows = two_leagues[0]
    mind = load_mind(folder / next(r["file"] for r in rows if r["mind"] == "rules"))
    assert play_plainly(arenas.ARENAS["cartpole"], mind, [arenas.EXAM_SEEDS])[0] == rows[2]["episodes"][0]["returned"]


def test_the_real_time_clock_repeats_the_last_action() -> None:
    "With a delay of two frames, a mind that answers 1 to everything plays two frames of 0 first."
    episode = play.play_guarded(arenas.ARENAS["cartpole"], Constant(1), [3], delay=2)[0]
    assert episode.actions[:4] == [0, 0, 1, 1]
