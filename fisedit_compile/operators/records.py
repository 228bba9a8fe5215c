"""What was measured: a record for each timed implementation of an operator, all in one file of the cache folder.

A record names what it was measured for in fields, so that whoever reads records compares fields and parses no text.
Records of a processor hold for one machine (processor, threads, PyTorch), those of a GPU for one chip, so that only the
first edits of their kind on a machine measure. The first few processes measure again and the smallest times count, so
that a choice made while the machine was busy does not stay. Implementations differ by rounding errors only.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fisedit_compile.operators.processor import processor_name
from fisedit_compile.options import cache_folder

logger = logging.getLogger(__name__)

Times = dict[str, float]
#: A number, a text or a truth: what a field of a case may be.
Value = str | int | float | bool
#: Timed runs of each implementation; the fastest counts, because whatever else the machine does only adds.
RUNS = 3
#: Seconds after which no further runs of a case are timed.
ENOUGH = 0.25
#: Processes that measure a case before its times are taken as they are.
PROCESSES = 3
#: Share of the usual implementation's time below which another one is taken.
CLEARLY = 0.95


def machine() -> str:
    """What times on a processor depend on besides the operator."""
    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@lru_cache(maxsize=32)
def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as a field of a case: ``float32``."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def typical_count(count: int) -> int:
    """A count as a field of a case, equal for counts whose times are alike: they are about a fifth apart."""
    return round(2 ** (round(4 * math.log2(max(count, 1))) / 4))


@dataclass(frozen=True)
class Record:
    """One timed implementation.

    Attributes:
        operator: what was measured.
        case: what its time depends on, by name.
        implementation: its name.
        seconds: of the fastest run.
        machine: where it ran, :func:`machine` or the name of a chip.
        parameters: what the implementation was told besides, by name, such as block sizes.
    """

    operator: str
    case: dict[str, Value]
    implementation: str
    seconds: float
    machine: str
    parameters: dict[str, Value] = field(default_factory=dict)

    def line(self) -> bytes:
        """The record as a line of JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(line: bytes) -> Record:
        """The record of a line.

        Raises:
            ValueError: it holds something else.
        """
        content = json.loads(line)
        if not isinstance(content, dict) or content.keys() != Record.__dataclass_fields__.keys():
            raise ValueError(f"expected an object with {', '.join(Record.__dataclass_fields__)}")
        for name in ("operator", "implementation", "machine"):
            if not isinstance(content[name], str):
                raise ValueError(f"expected a text as {name}, got {content[name]!r}")
        for name in ("case", "parameters"):
            fields = content[name]
            if not isinstance(fields, dict) or not all(isinstance(value, Value) for value in fields.values()):
                raise ValueError(f"expected fields as {name}, got {fields!r}")
        seconds = content["seconds"]
        if not isinstance(seconds, int | float) or not 0.0 <= seconds < math.inf:
            raise ValueError(f"expected a number of seconds, got {seconds!r}")
        return Record(**content)


#: Operator, machine and the fields of a case in the order of their names.
Key = tuple[str, str, tuple[tuple[str, Value], ...]]
CaseType = TypeVar("CaseType", bound=tuple[Any, ...])


def _key(operator: str, machine: str, case: Mapping[str, Value]) -> Key:
    return operator, machine, tuple(sorted(case.items()))


class CostTable:
    """Records, and which implementation they say is the fastest. May be used by several threads and processes.

    Each record is a line of JSON, appended to the file as it is made: nothing that another process wrote is lost, and a
    process that is killed loses none.
    """

    def __init__(self, path: Path | None = None) -> None:
        """``path``: of the file; None: ``measured.jsonl`` in the cache folder."""
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[Key, list[Record]] | None = None
        self._measured: set[Key] = set()
        self._decided: dict[tuple[Any, ...], str] = {}

    @property
    def path(self) -> Path:
        """Where the records are kept."""
        return self._path or cache_folder() / "measured.jsonl"

    def records(self, operator: str, case: NamedTuple, machine: str) -> list[Record]:
        """All records of a case on a machine, oldest first."""
        with self._lock:
            return list(self._table().get(_key(operator, machine, case._asdict()), ()))

    def entries(self, operator: str, case_type: type[CaseType]) -> dict[CaseType, Times]:
        """Seconds by implementation of all cases of an operator that were measured on this machine.

        Args:
            operator: its name.
            case_type: a named tuple with the fields of its cases; records of other fields, as another version may have
                written them, are left out.
        """
        here, found = machine(), {}
        names = sorted(case_type._fields)  # type: ignore[attr-defined]
        with self._lock:
            for (name, where, case), records in self._table().items():
                if (name, where) == (operator, here) and [field for field, _ in case] == names:
                    found[case_type(**dict(case))] = _smallest(records)
        return found

    def add(self, records: Iterable[Record]) -> None:
        """Keep records, also in the file."""
        added = list(records)
        with self._lock:
            table = self._table()
            for record in added:
                table.setdefault(_key(record.operator, record.machine, record.case), []).append(record)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write, as other processes may be writing; on a new line, as one of them may have been killed.
                with self.path.open("ab", buffering=0) as file:
                    file.write(b"".join(b"\n" + record.line() for record in added))
            except OSError as error:
                logger.warning("cannot keep measured times in %s: %s", self.path, error)

    def forget(self) -> None:
        """Read the file anew when next asked."""
        with self._lock:
            self._known = None
            self._measured.clear()
            self._decided.clear()

    def known(self, operator: str, case: NamedTuple, names: tuple[str, ...]) -> str | None:
        """What :meth:`fastest` said of the same implementations in this process; None where it was not asked."""
        return self._decided.get((operator, case, names, torch.get_num_threads()))

    def fastest(self, operator: str, case: NamedTuple, ways: Mapping[str, Callable[[], object]]) -> str:
        """The fastest implementation of an operator.

        Args:
            operator: its name.
            case: what its time depends on.
            ways: by name, functions that compute the same; the first is the usual one.

        Returns:
            The name of one of them; the usual one counts as the fastest unless another is clearly faster. All are
            measured when one of them was never measured in this case, or when only few processes measured it and this
            one did not.
        """
        decided = self.known(operator, case, tuple(ways))
        if decided is None:
            decided = self._decide(operator, case, ways)
            self._decided[operator, case, tuple(ways), torch.get_num_threads()] = decided
        return decided

    def _decide(self, operator: str, case: NamedTuple, ways: Mapping[str, Callable[[], object]]) -> str:
        here = machine()
        key = _key(operator, here, case._asdict())
        with self._lock:
            records = list(self._table().get(key, ()))
            processes = [sum(record.implementation == name for record in records) for name in ways]
            measure = not all(processes) or (min(processes) < PROCESSES and key not in self._measured)
        if measure:
            fresh = _measure(ways)
            shown = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in fresh.items())
            logger.info("%s %s: %s", operator, case, shown)
            made = [Record(operator, case._asdict(), name, seconds, here) for name, seconds in fresh.items()]
            self.add(made)
            with self._lock:
                self._measured.add(key)
                records = list(self._table()[key])
        times = _smallest(records)
        usual = next(iter(ways))
        fastest = min(ways, key=times.__getitem__)
        return fastest if times[fastest] < CLEARLY * times[usual] else usual

    def _table(self) -> dict[Key, list[Record]]:
        if self._known is None:
            self._known = {}
            for record in self._read():
                key = _key(record.operator, record.machine, record.case)
                self._known.setdefault(key, []).append(record)
        return self._known

    def _read(self) -> list[Record]:
        """The file's content. What cannot be read is told and passed over, as it can be measured again."""
        try:
            lines = [line for line in self.path.read_bytes().splitlines() if line]
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("cannot read measured times from %s: %s; measuring again", self.path, error)
            return []
        records = []
        for line in lines:
            try:
                records.append(Record.parse(line))
            except ValueError:
                continue
        broken = len(lines) - len(records)
        if broken:
            logger.warning("%d of %d lines of %s are no measured times; passed over", broken, len(lines), self.path)
        return records


def _smallest(records: Iterable[Record]) -> Times:
    """The smallest time of each implementation."""
    times: Times = {}
    for record in records:
        times[record.implementation] = min(record.seconds, times.get(record.implementation, math.inf))
    return times


def _measure(ways: Mapping[str, Callable[[], object]]) -> Times:
    """Seconds of the fastest of a few runs of each way. They take turns, so that a slower while is one for all."""
    for way in ways.values():
        way()
    times = dict.fromkeys(ways, float("inf"))
    spent = 0.0
    for _ in range(RUNS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds = time.perf_counter() - started
            times[name] = min(times[name], seconds)
            spent += seconds
        if spent > ENOUGH:
            break
    return times


#: Of this process.
costs = CostTable()
