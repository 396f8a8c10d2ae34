"""The report of a run: one self-contained HTML file under ``report/index.html``."""

from __future__ import annotations

from actors.report.page import write_report

__all__ = ["write_report"]
