"""What is not yet as it should be, by reason: the tests expect these models to fail, and fail once they do not."""

from __future__ import annotations

from zoo import Entry

FINDINGS: dict[str, tuple[str, ...]] = {}


def finding(chosen: Entry) -> str:
    """Why the entry is not exact yet; empty if nothing is known."""
    full_name = f"{chosen.library} {chosen.name}"
    return next((reason for reason, names in FINDINGS.items() if full_name in names), "")
