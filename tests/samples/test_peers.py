"""samples/peers.py: rounds, table and workers with an engine that counts; two real peers behind the slow marker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# At the end, so that no sample's name hides anything.
sys.path.append(str(ROOT / "samples"))

from side_by_side import report  # noqa: E402
from side_by_side.catalogue import PEERS, RECIPES, REFERENCE, chosen  # noqa: E402
from side_by_side.client import Worker  # noqa: E402
from side_by_side.environments import OURS, PeerError  # noqa: E402
from side_by_side.models import Models  # noqa: E402
from side_by_side.rounds import Measured, SideBySide, groups  # noqa: E402


class Scripted:
    """A player that takes given seconds, says given tokens, and notes when it is asked."""

    def __init__(self, name: str, asked: list[str], seconds: list[float], token: int = 7, fails_at: int = 99) -> None:
        self._name, self._asked, self._seconds, self._token, self._fails_at = name, asked, seconds, token, fails_at
        self._rounds = 0

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        self._asked.append(self._name)
        self._rounds += 1
        if self._rounds == self._fails_at:
            raise PeerError("out of luck")
        return [7] * (tokens - 1) + [self._token], self._seconds[self._rounds - 1]

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        return [7] * (len(ids) - prompt) + [self._token]

    def status(self) -> tuple[int | None, str]:
        return 5_000_000, "noted"


def _played(rounds: int = 4, **players: Scripted) -> dict[str, Measured]:
    results = {name: Measured(name.title()) for name in players}
    turns = SideBySide(players, results, "plain", pause=0)
    for number in range(rounds):
        turns.decode([1, 2], 4, keep=number > 0)
    turns.look()
    turns.read([np.arange(6), np.arange(5)], 3)
    return results


def test_all_decode_in_every_round_and_ratios_are_taken_within_it() -> None:
    asked: list[str] = []
    found = _played(
        plain=Scripted("plain", asked, [9, 1, 2, 3]),
        quick=Scripted("quick", asked, [9, 0.5, 0.5, 3], token=8),
        other=Scripted("other", asked, [9, 1, 2, 3]),
    )
    turns = [sorted(asked[start : start + 3]) for start in range(0, 12, 3)]
    assert turns == [["other", "plain", "quick"]] * 4
    assert len({tuple(asked[start : start + 3]) for start in range(0, 12, 3)}) > 1
    assert found["quick"].ratios == [2, 4, 1] and found["other"].ratios == found["plain"].ratios == [1, 1, 1]
    assert found["quick"].rate(4) == 3 / 0.5
    assert (found["quick"].tokens, found["quick"].differing, found["other"].differing) == (12, 3, 0)
    assert [list(text) for text in found["quick"].agrees] == [[True, True, True, False], [True, True, False]]
    assert (found["quick"].resident, found["quick"].note) == (5_000_000, "noted")


def test_who_fails_leaves_and_the_others_go_on() -> None:
    asked: list[str] = []
    found = _played(plain=Scripted("plain", asked, [1] * 4), unlucky=Scripted("unlucky", asked, [1] * 4, fails_at=3))
    assert asked.count("unlucky") == 3 and asked.count("plain") == 4
    assert found["unlucky"].failure == "out of luck" and not found["unlucky"].agrees
    assert len(found["unlucky"].seconds) == 1 and len(found["plain"].seconds) == 3
    with pytest.raises(PeerError, match="out of luck"):
        _played(plain=Scripted("plain", [], [1] * 4, fails_at=2))


def test_too_few_tokens_count_as_differing() -> None:
    short = Scripted("short", [], [1] * 4)
    short.decode = lambda prompt, tokens: ([7], 1.0)  # type: ignore[method-assign]
    assert _played(plain=Scripted("plain", [], [1] * 4), short=short)["short"].differing == 9


def test_peers_are_taken_so_many_at_a_time_beside_the_reference() -> None:
    assert list(groups(["plain", "a", "b", "c"], "plain", 2)) == [["plain", "a", "b"], ["plain", "c"]]
    assert list(groups(["plain", "a", "b", "c"], "plain", None)) == [["plain", "a", "b", "c"]]
    assert list(groups(["plain"], "plain", None)) == [["plain"]]


def _results() -> dict[str, Measured]:
    agrees = [np.array([True, True, False, True])] * 2
    return {
        "plain": Measured("plain", [2.0, 2.0], [2.0, 2.0], 8, 0, [np.ones(4, bool)] * 2, 100_000_000),
        "quick": Measured("**river**", [1.0, 0.5], [2.0, 2.0], 8, 3, agrees, 50_000_000, "mean exit depth 4.0"),
        "absent": Measured("absent", failure="does not install: no wheel"),
    }


def test_the_table_has_a_row_for_each_peer_and_says_who_failed() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table(_results(), 4).splitlines()]
    assert {len(row) for row in rows} == {7} and len(rows) == 5
    assert rows[2] == ["plain", "1.5", "1.00x (1.00x)", "100.0% (100% to 100%)", "0 of 8", "100", ""]
    expected = ["**river**", "4.0", "3.00x (2.00x)", "75.0% (75% to 75%)", "3 of 8", "50", "mean exit depth 4.0"]
    assert rows[3] == expected
    assert rows[4] == ["absent", "-", "-", "-", "-", "-", "does not install: no wheel"]


def test_json_and_picture_have_what_was_measured(tmp_path: Path) -> None:
    found = json.loads(json.dumps(report.document(_results(), 4, cpu="a CPU")))
    assert found["cpu"] == "a CPU" and found["peers"]["quick"]["ratios"] == [2, 4]
    assert found["peers"]["quick"]["agreement"]["value"] == 0.75 and found["peers"]["quick"]["positions"] == 8
    assert "ratio" not in found["peers"]["absent"] and found["peers"]["absent"]["failure"]
    whole, unread = tmp_path / "whole.png", tmp_path / "unread.png"
    report.draw(_results(), "a title", whole)
    report.draw({name: Measured(r.title, r.seconds, r.of_reference) for name, r in _results().items()}, "", unread)
    assert whole.read_bytes()[:4] == unread.read_bytes()[:4] == b"\x89PNG" != whole.read_bytes()[-4:]
    assert whole.read_bytes() != unread.read_bytes()


def _worker(tmp_path: Path, patience: float = 60, **settings: Any) -> Worker:
    load = {"engine": "tests.samples.counting_engine", "model": "", "threads": 1, "capacity": 32}
    return Worker(Path(sys.executable), tmp_path / "log", patience, **load, settings=settings)


def test_a_worker_answers_whatever_its_libraries_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with _worker(tmp_path, step=2) as worker:
        assert worker.decode([4], 3) == ([6, 8, 10], 0.5)
        assert worker.choices([1, 2, 3, 4], 2) == [4, 5, 6]
        with pytest.raises(PeerError, match=r"^ValueError: an empty prompt$"):
            worker.decode([], 3)
        resident, note = worker.status()
        assert note == "in steps of 2" and (resident is None or 1e6 < resident < 1e9)
        with pytest.raises(PeerError, match=r"^ended with status 3: Fatal: out of luck$"):
            worker.decode([13], 3)
        with pytest.raises(PeerError, match=r"^ended with status 3"):
            worker.decode([4], 3)
    assert "libraries write what they like" in (tmp_path / "log").read_text()


def test_a_worker_that_cannot_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(PeerError, match=r"^TypeError: load\(\) got an unexpected keyword argument 'stride'$"):
        _worker(tmp_path, stride=2)
    with pytest.raises(PeerError, match=r"^ModuleNotFoundError: No module named 'nothing'$"):
        load = {"model": "", "threads": 1, "capacity": 32, "settings": {}}
        Worker(Path(sys.executable), tmp_path / "log", 60, engine="nothing", **load)


def test_a_worker_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with _worker(tmp_path, patience=20) as worker:
        worker._patience = 0.2
        with pytest.raises(PeerError, match=r"^no answer in 0.2 s$"):
            worker.decode([14], 3)
        with pytest.raises(PeerError, match=r"^ended with status -9"):
            worker.status()


def test_a_model_is_made_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    asked: list[Path] = []

    def archive(source: Path, made: Any, out: Path) -> list[Any]:
        asked.append(out)
        return [("zipfile", "-c", out / "model.zip", source)]

    def refused(source: Path, made: Any, out: Path) -> list[Any]:
        return [("zipfile", "-c", out / "model.zip", source), ("zipfile", "-t", made("good") / "gone.zip")]

    models = Models(source, tmp_path / "models", {"good": (OURS, archive), "bad": (OURS, refused)})
    assert models.made("") == source
    assert models.made("good") == models.made("good") == tmp_path / "models" / "good"
    again = Models(source, tmp_path / "models", {"good": (OURS, archive)}, anew=True)
    assert len(asked) == 1 and again.made("good") == again.made("good") and len(asked) == 2
    assert (tmp_path / "models" / "good" / "model.zip").is_file()
    with pytest.raises(PeerError, match=r"^no model: FileNotFoundError: "):
        models.made("bad")
    assert not (tmp_path / "models" / "bad").exists()


def test_names_are_checked_and_every_peer_has_its_model() -> None:
    assert [peer.name for peer in chosen("river-all", False)] == [REFERENCE, "river-all"]
    assert chosen(None, False) == list(PEERS)
    of_random_weights = {peer.name for peer in chosen(None, True)}
    assert {"river-exact", "river-torch-tau"}.isdisjoint(of_random_weights) and "river-all" in of_random_weights
    with pytest.raises(ValueError, match="no such peer: river-al; there are onnxruntime, "):
        chosen("river-al", False)
    assert {peer.model for peer in PEERS} - {""} == set(RECIPES)
    engines = {path.stem for path in (ROOT / "samples" / "side_by_side" / "engines").glob("*.py")}
    assert {peer.engine for peer in PEERS} <= engines


@pytest.mark.slow
def test_two_real_peers(tmp_path: Path) -> None:
    small = ["--shape", "tiny", "--rounds", "2", "--tokens", "8", "--threads", "1"]
    written = ["--peers", "river-all,inductor-fp32", "--json", tmp_path / "found.json", "--png", tmp_path / "found.png"]
    command = [sys.executable, "samples/peers.py", *small, *map(str, written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["peers"]
    assert list(found) == ["onnxruntime", "inductor-fp32", "river-all"]
    assert all(not peer["failure"] and len(peer["ratios"]) == 2 for peer in found.values())
    assert found["inductor-fp32"]["differing"] == 0 and found["inductor-fp32"]["tokens"] == 16
    assert found["river-all"]["note"] == "mean exit depth 0.0"
    assert done.stdout.count("\n| ") == 5 and (tmp_path / "found.png").stat().st_size > 5_000
