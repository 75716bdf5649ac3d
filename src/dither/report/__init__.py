"""The report of a run: one HTML page, complete in itself, for whoever answers for privacy."""

from dither.report.page import write_report as write_report

__all__ = ["write_report"]
