"""What is wrong with a source before anything trains on it: faults, a report with pictures, a quarantine list."""

from __future__ import annotations

from services.data.checks.evaluation_sets import EvaluationSet
from services.data.checks.findings import Fault, Finding
from services.data.checks.run import CheckReport, check_source, run_check

__all__ = ["CheckReport", "EvaluationSet", "Fault", "Finding", "check_source", "run_check"]
