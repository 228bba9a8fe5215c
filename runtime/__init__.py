"""Recorded runs, masks and index plans. Knows tensors and sites, no graphs."""

if __name__ != "fisedit_compile.runtime":
    raise ImportError(f"import this package as fisedit_compile.runtime, not as {__name__}")

from fisedit_compile.runtime.base import ProgramKey, RecordedCall
from fisedit_compile.runtime.filling import FillingCall
from fisedit_compile.runtime.fingerprint import Fingerprint
from fisedit_compile.runtime.phases import EditPhase, RecordPhase
from fisedit_compile.runtime.plancache import PlanSpec
from fisedit_compile.runtime.reached import ReachCheck
from fisedit_compile.runtime.relay import PhaseSource, Relay
from fisedit_compile.runtime.runtime import EditRun, RecordRun, Runtime, default_runtime
from fisedit_compile.runtime.spec import Domain, PlanInput, Site, Stencil
from fisedit_compile.runtime.stats import Stats

__all__ = [
    "Domain",
    "EditPhase",
    "EditRun",
    "FillingCall",
    "Fingerprint",
    "PhaseSource",
    "PlanInput",
    "PlanSpec",
    "ProgramKey",
    "ReachCheck",
    "RecordPhase",
    "RecordRun",
    "RecordedCall",
    "Relay",
    "Runtime",
    "Site",
    "Stats",
    "Stencil",
    "default_runtime",
]
