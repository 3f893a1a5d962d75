"""Start-up in new processes: each way with its own cache, and the ratio to plain Inductor."""

from __future__ import annotations

from pathlib import Path

import pytest

from river_compile.cli.bench_report import startup_table
from river_compile.errors import InputError
from river_compile.measure import startup
from river_compile.measure.bench import BenchResult
from river_compile.measure.startup import Startup, measure_startup
from tests.families import random_model

HOW = {"dtype": "float32", "device": "cpu"}


def test_ways_have_a_cache_each_and_ratios_are_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cold and three warm processes for each way, in turn."""
    caches: dict[bool, set[str]] = {True: set(), False: set()}
    seconds = {True: iter([8.0, 1.0, 2.0, 9.0]), False: iter([4.0, 4.0, 4.0, 4.0])}

    def run(request: dict[str, object], cache: str) -> tuple[list[float], list[float]]:
        river = request["options"] is not None
        caches[river].add(cache)
        first = next(seconds[river])
        return [first, 2 * first], [first, 3 * first]

    monkeypatch.setattr(startup, "_run", run)
    found = measure_startup("model", options={"bits": 4}, **HOW)
    assert [(row.cache, row.way) for row in found] == [
        ("cold", "inductor"),
        ("cold", "river"),
        ("warm", "inductor"),
        ("warm", "river"),
    ]
    assert [row.cpu_ratio for row in found] == [(1, 1), (2, 2), (1, 1), (0.5, 0.5)]
    assert found[3].cpu_seconds == (2, 4)
    assert found[3].wall_seconds == (2, 6)
    assert all(len(folders) == 1 for folders in caches.values())
    assert not caches[True] & caches[False]


def test_the_table_has_a_line_for_each_way_and_cache() -> None:
    rows = [Startup(way, "cold", (1.0, 2.0), (3.0, 4.0), (1.0, 1.0), (1.0, 0.5)) for way in ("inductor", "river")]
    result = BenchResult("m", "cpu", "bfloat16", 1, 3, 3, 100.0, [], {}, 10, 2, {}, rows)
    table = startup_table(result)
    assert table.row_count == 2
    assert [list(column.cells)[1] for column in table.columns] == [
        "cold, river",
        "1.0 (1.00x)",
        "3.0 (1.00x)",
        "2.0 (1.00x)",
        "4.0 (0.50x)",
    ]


def test_a_process_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"start-up could not be measured: .*\S"):
        measure_startup(tmp_path / "none", options={}, warm_rounds=0, **HOW)


@pytest.mark.slow
def test_the_next_process_finds_the_pieces_on_disk(tmp_path: Path) -> None:
    random_model("llama", 2).save_pretrained(tmp_path / "model")
    found = {
        (row.cache, row.way): row
        for row in measure_startup(tmp_path / "model", options={"bits": 4}, warm_rounds=1, **HOW)
    }
    for row in found.values():
        assert 0 < row.cpu_seconds[0] < row.cpu_seconds[1]
        assert 0 < row.wall_seconds[0] < row.wall_seconds[1]
    assert found["warm", "river"].cpu_seconds[1] < 0.5 * found["cold", "river"].cpu_seconds[1]
