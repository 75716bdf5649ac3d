"""Every rule as a small model: one line of registration per case, run by the conformance suite in every strategy."""

from __future__ import annotations

import cases_attention  # noqa: F401
import cases_convolutions  # noqa: F401
import cases_derived  # noqa: F401
import cases_elementwise  # noqa: F401
import cases_other  # noqa: F401
import cases_products  # noqa: F401
import cases_ragged  # noqa: F401
import cases_recurrent  # noqa: F401
import cases_tables  # noqa: F401
from case_registry import CASES

__all__ = ["CASES"]
