"""Which of several ways to compute an operator is the fastest on this machine: measured once, then remembered.

Times are kept in a file of the user's cache folder, with the machine (processor, threads, PyTorch) they belong to, so
that only the first edits of their kind on a machine measure. The first few processes measure again and the smallest
times count, so that a choice made while the machine was busy does not stay. The ways differ by rounding errors only.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fisedit_compile.options import cache_folder

logger = logging.getLogger(__name__)

Times = dict[str, float]
#: Timed runs of each way; the fastest counts, because whatever else the machine does only adds.
RUNS = 3
#: Seconds after which no further runs of a case are timed.
ENOUGH = 0.25
#: Processes that measure a case before its times are taken as they are.
PROCESSES = 3
#: Share of the usual way's time below which another way is taken.
CLEARLY = 0.95


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """What measured times depend on besides the operator."""
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def describe_dtype(dtype: torch.dtype) -> str:
    """A dtype in words."""
    return str(dtype).removeprefix("torch.")


def describe_count(count: int) -> str:
    """A count in words, equal for counts whose times are alike: they are about a fifth apart."""
    return f"about {round(2 ** (round(4 * math.log2(max(count, 1))) / 4))}"


@dataclass(frozen=True)
class Measured:
    """Seconds by way, and in how many processes they were measured."""

    seconds: Times
    processes: int

    def together_with(self, times: Times) -> Measured:
        """The smaller times of this and of one more process; a way that is new is to be confirmed like the first."""
        seconds = {name: min(time, self.seconds.get(name, time)) for name, time in times.items()}
        before = self.processes if times.keys() <= self.seconds.keys() else 0
        return Measured(self.seconds | seconds, before + 1)


NEVER = Measured({}, 0)


class CostTable:
    """Seconds by operator, case and way. May be used by several threads and processes.

    Each measurement is a line of JSON, appended to the file as it is made: nothing that another process wrote is lost,
    and a process that is killed loses none.
    """

    def __init__(self, path: Path | None = None) -> None:
        """``path``: of the file; None: ``costs.jsonl`` in the cache folder."""
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, Measured]] | None = None
        self._measured: set[str] = set()

    @property
    def path(self) -> Path:
        """Where the table is kept."""
        return self._path or cache_folder() / "costs.jsonl"

    def times(self, operator: str, case: str) -> Times:
        """Seconds by way, as far as measured on this machine."""
        return self.entries().get(f"{operator} {case}", {})

    def entries(self) -> dict[str, Times]:
        """Everything measured on this machine, by operator and case."""
        with self._lock:
            return {key: dict(found.seconds) for key, found in self._machine_table().items()}

    def choose(self, operator: str, case: str, ways: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """What the fastest way returns, which is counted in ``taken``; arguments are those of :meth:`fastest`."""
        way = self.fastest(operator, case, ways)
        taken.note(f"{operator}: {way}")
        return ways[way]()

    def fastest(self, operator: str, case: str, ways: Mapping[str, Callable[[], Tensor]]) -> str:
        """The fastest way to compute an operator.

        Args:
            operator: its name.
            case: what its time depends on, in words.
            ways: by name, functions that compute the same; the first is the usual one.

        Returns:
            The name of a way; the usual one counts as the fastest unless another is clearly faster. All ways are
            measured when one of them was never measured in this case, or when only few processes measured it and this
            one did not.
        """
        key = f"{operator} {case}"
        with self._lock:
            found = self._machine_table().get(key)
            unsure = found is not None and found.processes < PROCESSES and key not in self._measured
        if found is None or unsure or any(name not in found.seconds for name in ways):
            found = self._remember(key, _measure(ways))
        times = found.seconds
        usual = next(iter(ways))
        fastest = min(ways, key=times.__getitem__)
        return fastest if times[fastest] < CLEARLY * times[usual] else usual

    def _machine_table(self) -> dict[str, Measured]:
        if self._known is None:
            self._known = self._read()
        return self._known.setdefault(machine(), {})

    def _read(self) -> dict[str, dict[str, Measured]]:
        """The file's content. What cannot be read is told and passed over, as it can be measured again."""
        known: dict[str, dict[str, Measured]] = {}
        try:
            lines = [line for line in self.path.read_bytes().splitlines() if line]
        except FileNotFoundError:
            return known
        except OSError as error:
            logger.warning("cannot read measured times from %s: %s; measuring again", self.path, error)
            return known
        broken = 0
        for line in lines:
            try:
                name, key, times = _parse(line)
            except ValueError:
                broken += 1
                continue
            table = known.setdefault(name, {})
            table[key] = table.get(key, NEVER).together_with(times)
        if broken:
            logger.warning("%d of %d lines of %s are no measured times; passed over", broken, len(lines), self.path)
        return known

    def _remember(self, key: str, times: Times) -> Measured:
        logger.info("%s: %s", key, ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items()))
        with self._lock:
            table = self._machine_table()
            found = table[key] = table.get(key, NEVER).together_with(times)
            self._measured.add(key)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                line = json.dumps({"machine": machine(), "case": key, "seconds": times}).encode()
                # One write, as other processes may be writing; on a new line, as one of them may have been killed.
                with self.path.open("ab", buffering=0) as file:
                    file.write(b"\n" + line)
            except OSError as error:
                logger.warning("cannot keep measured times in %s: %s", self.path, error)
        return found


def _parse(line: bytes) -> tuple[str, str, Times]:
    """Machine, operator and case, and times of one line.

    Raises:
        ValueError: it has another form.
    """
    try:
        content = json.loads(line)
        times = {str(way): float(seconds) for way, seconds in content["seconds"].items()}
        return str(content["machine"]), str(content["case"]), times
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected a line of measured times ({type(error).__name__}: {error})") from error


def _measure(ways: Mapping[str, Callable[[], Tensor]]) -> Times:
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


class Taken(threading.local):
    """How often each way was taken in this thread, since somebody last asked."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, way: str) -> None:
        """Count a way."""
        self._counts[way] += 1

    def add(self, counts: Mapping[str, int]) -> None:
        """Count several ways."""
        self._counts.update(counts)

    @contextmanager
    def apart(self) -> Iterator[Counter[str]]:
        """Count what is taken inside by itself; the counts are what is yielded."""
        before, self._counts = self._counts, Counter()
        try:
            yield self._counts
        finally:
            self._counts = before

    def drain(self) -> Counter[str]:
        """The counts, which begin anew."""
        counts, self._counts = self._counts, Counter()
        return counts


taken = Taken()
