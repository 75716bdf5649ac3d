"""Results as JSON, tables, a page, a picture; and compared with a baseline. The figures here are made up."""

from __future__ import annotations

import copy
import re

import pytest

from dither.benchmark import picture, table
from dither.benchmark.check import regressions
from dither.benchmark.results import Cell, Explained, Growth, Results, Row
from dither.errors import ConfigurationError


@pytest.fixture
def results():
    cells = {
        "plain": Cell(seconds=[1.0, 2.0, 4.0], first_seconds=3.0, peak_mib=100.0),
        "auto": Cell(seconds=[1.1, 2.4, 4.2], first_seconds=8.0, distance=0.0, peak_mib=130.0),
        "opacus_hooks": Cell(seconds=[2.0, 3.0, 9.0], first_seconds=5.0, distance=0.25, peak_mib=350.0),
        "opacus_ghost": Cell(error="NotImplementedError: no | tying"),
        "jax_plain": Cell(seconds=[0.5, 0.5, 0.5], first_seconds=9.0, peak_mib=50.0),
        "jax_privacy": Cell(seconds=[1.0, 1.5, 1.25], first_seconds=9.0, peak_mib=500.0),
    }
    broken = {"plain": Cell(error="ImportError: no transformers"), "auto": Cell(error="ImportError: no transformers")}
    about = {
        "machine": "a machine",
        "versions": {"torch": "2.14.1"},
        "date": "2026-11-24",
        "threads": 2,
        "smoke": False,
        "settings": {"microbatches": 8, "pairs": 3, "warm_up": 2},
    }
    sizes = "width 64, depth 1, T 16, batch 3"
    growth = Growth(
        "batch", sizes, [2, 4], {"plain": [[1.0], [2.0]], "auto": [[1.5], [2.5]]}, {"plain": 1.0, "auto": 0.74}
    )
    uses = [Explained("a.weight", "linear", "hold", 2**20, 0.002, 0.003), Explained("b", "add", "hold", 0, 0.0, 0.001)]
    return Results(
        about, [Row("dit-384", sizes, cells), Row("gpt2", sizes, broken)], [growth], {"dit-384": uses}, ["growth: why"]
    )


def parsed(page: str, title: str) -> dict[str, list[str]]:
    """The table under a title, by first column; every row as wide as the header."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1
    assert len({len(line) for line in lines}) == 1
    return {row[0]: row[1:] for row in rows}


def test_ratios_parse(results):
    found = parsed(table.page(results, "make bench", None), "Step time over the plain step")
    assert found["over plain"] == ["dit-384", "gpt2"]
    assert found["dither auto"][0] == "1.10 (1.05 to 1.20)"  # of pairs, never of medians
    assert found["Opacus hooks"][0] == "2.00 (1.50 to 2.25), sum off by 2e-01"
    assert found["Opacus ghost"][0] == r"NotImplementedError: no \| tying"
    assert found["jax-privacy"][0] == "2.50 (2.00 to 3.00)"
    assert found["dither auto"][1] == "ImportError: no transformers"
    assert "plain" not in found


def test_the_other_tables_parse(results):
    page = table.page(results, "make bench", "images/performance.png")
    memory = parsed(page, "Peak memory over the plain step")
    assert [memory[name][0] for name in ("dither auto", "jax-privacy")] == ["1.30", "10.00"]
    assert parsed(page, "First step")["dither auto"][0] == "4.00"
    plain = parsed(page, "Plain steps")
    assert plain["dit-384"] == [results.rows[0].sizes, "2.000 s", "100 MiB", "0.500 s", "50 MiB"]
    growth = parsed(page, "Growth with batch")
    assert growth["exponent"][:2] == ["1.00", "0.74"]
    assert growth["4"][2] == "1.25 (1.25 to 1.25)"
    plan = parsed(page, "The plan of dit-384")
    assert plan["a.weight"] == ["linear", "hold", "1.00", "2.000", "3.000", "1.50"]
    assert plan["all uses"][-2:] == ["4.000", "2.00"]
    assert "- growth: why" in page
    assert "![Step time and peak memory over the plain step](images/performance.png)" in page
    assert "a machine" in page
    assert "Tiny" not in page


def test_a_plan_without_predictions(results):
    results.explained["dit-384"] = [Explained("a", "linear", "hold", 0, None, 0.001)]
    plan = parsed(table.page(results, "make bench", None), "The plan of dit-384")
    assert plan["all uses"][-3:] == ["", "1.000", ""]


def test_tiny_sizes_say_so(results):
    results.about["smoke"] = True
    assert "no figure here means anything" in table.page(results, "make bench", None)


def test_memory_that_was_not_measured_has_no_table(results):
    for row in results.rows:
        for cell in row.cells.values():
            cell.peak_mib = None
    assert "Peak memory" not in table.page(results, "make bench", None)


def test_round_trip(results, tmp_path):
    results.save(tmp_path / "folder" / "results.json")
    assert Results.load(tmp_path / "folder" / "results.json") == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"model": 1}]}', '{"about": {}, "rows": 3}'])
def test_a_file_of_somebody_else(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigurationError, match="was not written by"):
        Results.load(tmp_path / "other.json")
    with pytest.raises(ConfigurationError, match="cannot read"):
        Results.load(tmp_path / "missing.json")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(results, ending, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "images" / f"performance.{ending}"
    picture.draw(results, path)
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start


def test_no_regression_against_itself(results):
    assert regressions(results, results) == []


def test_a_tenth_is_allowed_and_no_more(results):
    slower, baseline = copy.deepcopy(results), results
    slower.rows[0].cells["auto"].seconds = [1.0 * 1.20, 2.0 * 1.20, 4.0 * 1.20]  # the baseline's median is 1.10
    assert regressions(slower, baseline) == []
    slower.rows[0].cells["auto"].seconds = [1.0 * 1.22, 2.0 * 1.22, 4.0 * 1.22]
    (said,) = regressions(slower, baseline)
    assert "dither auto on dit-384" in said
    assert "step time is 1.22 of the plain step's, it was 1.10" in said
    assert regressions(baseline, slower) == []  # faster is no regression


def test_a_doctored_baseline_fails(results):
    doctored = copy.deepcopy(results)
    doctored.rows[0].cells["auto"].peak_mib = 100.0
    (said,) = regressions(results, doctored)
    assert "peak memory is 1.30 of the plain step's, it was 1.00" in said


def test_a_model_that_no_longer_runs(results):
    refused = copy.deepcopy(results)
    refused.rows[0].cells["auto"] = Cell(error="CaptureError: no rule")
    assert regressions(refused, results) == [f"dither auto on {results.rows[0].key}: CaptureError: no rule"]
    assert regressions(results, refused) == []


def test_others_may_become_slower(results):
    slower = copy.deepcopy(results)
    slower.rows[0].cells["opacus_hooks"].seconds = [9.0, 9.0, 9.0]
    assert regressions(slower, results) == []


def test_nothing_in_common(results):
    other = copy.deepcopy(results)
    other.rows[0].sizes = other.rows[1].sizes = "width 128, depth 1, T 16, batch 3"
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        regressions(other, results)
    other = copy.deepcopy(results)
    other.about["settings"]["microbatches"] = 4
    with pytest.raises(ConfigurationError, match="4 micro-batches"):
        regressions(other, results)
