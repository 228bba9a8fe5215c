"""Recorded runs, masks and index plans. Knows tensors and sites, no graphs."""

if __name__ != "fisedit_compile.runtime":
    raise ImportError(f"import this package as fisedit_compile.runtime, not as {__name__}")

from .base import ProgramKey, RecordedCall
from .fingerprint import Fingerprint
from .phases import EditPhase, RecordPhase
from .plancache import PlanSpec
from .runtime import EditRun, RecordRun, Runtime, default_runtime
from .spec import Domain, PlanInput, Site, Stencil
from .stats import Stats

__all__ = [
    "Domain",
    "EditPhase",
    "EditRun",
    "Fingerprint",
    "PlanInput",
    "PlanSpec",
    "ProgramKey",
    "RecordPhase",
    "RecordRun",
    "RecordedCall",
    "Runtime",
    "Site",
    "Stats",
    "Stencil",
    "default_runtime",
]
