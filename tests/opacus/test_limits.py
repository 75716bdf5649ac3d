"""Every row of docs/opacus-limits.md: dither is exact or refuses by name; Opacus does what the page says it does."""

from __future__ import annotations

import limits_table
import pytest
from limits import LIMITS, Limit
from limits_measure import DITHER, MODES, OPACUS, outcome

pytestmark = pytest.mark.filterwarnings("ignore")

each_row = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
each_mode = pytest.mark.parametrize("mode", MODES)


@each_mode
@each_row
def test_dither(limit: Limit, mode: str) -> None:
    found = outcome(DITHER, mode, limit.make)
    assert limits_table.fulfils(found.category, limit.dither[MODES.index(mode)]), found.words


@each_mode
@each_row
def test_opacus(limit: Limit, mode: str) -> None:
    found = outcome(OPACUS, mode, limit.make)
    assert found.category == limit.opacus[MODES.index(mode)], found.words


def test_page_has_these_rows() -> None:
    page = limits_table.rows()
    assert [name for name, _, _ in page] == [limit.name for limit in LIMITS]
    for (name, stock, ours), limit in zip(page, LIMITS, strict=True):
        assert stock == limit.opacus, name
        assert all(map(limits_table.fulfils, ours, limit.dither)), name
