"""One bar for the whole of an edit: its phases weigh what they cost, and the time left is there from the first second.

What a phase costs is measured in passes of the network over one text. As phases go by, what they really took replaces
what was expected; what is still to come is scaled by it.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from tpatch_jax.typing import Progress

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = ["Estimate", "Phase", "edit_phases", "edit_progress", "format_seconds", "pass_seconds"]

TRUST = 0.005
"""What was expected counts like this share of all the work, against what was measured."""
LONG = 3600.0
"""Work that takes more seconds is warned of."""
MEASUREMENTS = 5
"""After so many measurements; each of the first may have waited for another program to be compiled."""
ENOUGH = 3
"""From so many rates on their median tells how fast a phase goes, whatever was compiled meanwhile."""
TEXT_TOKENS = 16
CPU_FLOPS, DEVICE_FLOPS = 2.5e10, 5e12
"""What one core, and any accelerator, is expected to do in a second before anything was measured."""


class Phase(NamedTuple):
    """A phase of work.

    Attributes:
        name: as it is reported.
        units: how many units it is expected to have.
        cost: of one unit, in passes of the network over one text.
    """

    name: str
    units: float
    cost: float


# Measured on smollm2-135m on two cores, with the default preset; what a phase costs differs little between models.
_AT_SUBJECT = (("reading requests", 1, 1.0), ("reading subjects", 14, 1.0), ("training values", 1, 130.0))
_IN_LAST_LAYER = (
    ("reading prompts", 4, 1.5),
    ("reading inside prompts", 1, 1.0),
    ("reading other subjects", 4, 1.0),
)
_FITTING = ("fitting", "fitting, attempt 2", "fitting, attempt 3")
_MANY = 256


def edit_phases(requests: int, subjects: int, prompts: int) -> list[Phase]:
    """What an edit is expected to do.

    Args:
        requests: how many there are.
        subjects: how many of them are edited at their subjects.
        prompts: how many prompts are asked in the end.

    Example:
        >>> [phase.name for phase in edit_phases(2, 0, 2)][:2]
        ['reading prompts', 'reading other subjects']
    """
    phases = []
    if subjects:
        phases += [Phase(name, each * (subjects if each == 1 else requests), cost) for name, each, cost in _AT_SUBJECT]
    phases += [Phase(name, each * requests, cost) for name, each, cost in _IN_LAST_LAYER]
    if requests < _MANY:
        phases = [phase for phase in phases if phase.name != "reading inside prompts"]
    # At a subject one neuron says most of a target; what is left is fitted token by token.
    tokens = 1.5 * (requests - subjects) + 0.15 * subjects
    phases += [Phase(name, tokens * share, 2.5) for name, share in zip(_FITTING, (1.0, 0.1, 0.05), strict=True)]
    return [*phases, Phase("measuring", prompts, 1.5), Phase("reading answers", 2 * prompts, 8.0)]


def pass_seconds(model: "Model") -> float:
    """What one pass of the network over one text is expected to take, before anything was measured."""
    import jax

    work = 2.0 * model.parameter_count * TEXT_TOKENS
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return work / (CPU_FLOPS * (os.cpu_count() or 1))
    return work / (DEVICE_FLOPS * len(devices))


def format_seconds(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> format_seconds(42), format_seconds(200), format_seconds(11700)
        ('42 s', '3 min 20 s', '3 h 15 min')
    """
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Measured:
    """How far a phase is, and how long it took."""

    def __init__(self, phase: Phase, expected: bool = True):
        self.phase, self.expected = phase, expected
        # Of what is done some was finished by an interrupted run; of the rest some came with the first report.
        self.done = self.kept = self.first_done = 0.0
        self.seconds = self.first_seconds = 0.0
        self.rates: list[float] = []

    def report(self, done: float, total: float, seconds: float, kept: bool) -> None:
        """More is done, in so many seconds."""
        self.phase = self.phase._replace(units=total)
        if kept:
            self.kept += done - self.done
        else:
            if not self.cost_done:
                self.first_done, self.first_seconds = done - self.done, seconds
            elif done > self.done:
                self.rates.append(seconds / (done - self.done))
            self.seconds += seconds
        self.done = done

    @property
    def cost_done(self) -> float:
        """Of what was done now."""
        return (self.done - self.kept) * self.phase.cost

    @property
    def cost_left(self) -> float:
        return max(0.0, self.phase.units - self.done) * self.phase.cost

    def running(self, each: float) -> float:
        """The seconds that it took without compiling, which comes before the first report, and now and then later.

        Where there was but one, what a pass takes elsewhere, ``each``, has to tell.
        """
        if len(self.rates) >= ENOUGH:
            return min(self.seconds, median(self.rates) * (self.done - self.kept))
        later = self.done - self.kept - self.first_done
        if later > 0:
            rate = (self.seconds - self.first_seconds) / later
            return self.seconds - max(0.0, self.first_seconds - rate * self.first_done)
        return min(self.seconds, max(self.seconds / 2, each * self.cost_done))


class Estimate:
    """How much of some phases is done, and how many seconds are left."""

    what: str

    def __init__(self, phases: Sequence[Phase], unit: float, clock: Callable[[], float] = time.monotonic):
        """What is to do, and what one pass is expected to take in seconds."""
        self._phases = {phase.name: _Measured(phase) for phase in phases}
        self._unit, self._each, self._clock = unit, unit, clock
        self._began = self._last = clock()
        self._current: _Measured | None = None
        self._total = sum(phase.units * phase.cost for phase in phases)
        self._shown = 0.0
        self.what = "preparing"

    def report(self, what: str, done: int, total: int, kept: bool = False) -> None:
        """So much of a phase is done; with ``kept``, what came to it was finished by an interrupted run."""
        now = self._clock()
        if what not in self._phases:
            # A phase that nobody expected: no more is known of it than what it says itself.
            self._phases[what] = _Measured(Phase(what, total, 1.0), expected=False)
        measured = self._phases[what]
        if measured is not self._current:
            self._pass_over(measured)
            self.what, self._current = what, measured
        measured.report(done, total, now - self._last, kept)
        self._last = now

    def _pass_over(self, until: _Measured) -> None:
        """Phases that were expected before one that began have nothing more to do."""
        for measured in self._phases.values():
            if measured is until or not until.expected:
                return
            measured.phase = measured.phase._replace(units=measured.done)

    def _seconds_per_pass(self) -> float:
        trust = TRUST * self._total
        known = [measured for measured in self._phases.values() if measured.expected and measured.cost_done]
        done = trust + sum(measured.cost_done for measured in known)
        if done:
            # What a pass was thought to take tells how much of a single report was compiling.
            seconds = trust * self._unit + sum(measured.running(self._each) for measured in known)
            self._each = seconds / done
        return self._each

    def left(self) -> float:
        """The seconds that are left."""
        each, since = self._seconds_per_pass(), self._clock() - self._last
        now = 0.0
        if (current := self._current) is not None and current.cost_left:
            # Of a phase that has only begun, what was expected of it counts as well.
            trust = TRUST * current.cost_left if current.expected else 0.0
            part = trust + current.cost_done
            speed = (trust * each + current.running(each)) / part if part else each
            now = max(0.0, current.cost_left * speed - since)
        later = sum(measured.cost_left for measured in self._phases.values() if measured is not current)
        # Between two phases the next one has begun, though it has not said so yet.
        between = current is None or not current.cost_left
        return max(0.0, later * each - since) if between else now + later * each

    def share(self) -> float:
        """The share of the whole time that is over; it never falls."""
        over, left = self._clock() - self._began, self.left()
        self._shown = max(self._shown, over / (over + left) if over + left else 0.0)
        return self._shown


@contextmanager
def edit_progress(
    quiet: bool,
    phases: Sequence[Phase],
    unit: float,
    measured: Sequence[str],
    warn: Callable[[float], None],
    kept: Callable[[], int] = lambda: 0,
) -> Iterator[Progress]:
    """A report function that draws one bar for all phases, with the time left.

    Args:
        quiet: draw nothing; nothing is drawn off a terminal either.
        phases: what is to do, in order.
        unit: what one pass is expected to take, in seconds.
        measured: after five reports of any of these phases the time left is known well enough to be warned of; the
            first ones have waited for programs to be compiled.
        warn: called once with the seconds that are left where they are many.
        kept: how many parts so far were those of an interrupted run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    estimate, measurements, known = Estimate(phases, unit), 0, 0

    class TimeLeft(ProgressColumn):
        """The seconds that are left; of the estimate, not of the bar."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            if task.finished:
                return Text("")
            # The bar goes on between reports, as time does.
            task.completed = max(task.completed, min(0.999, estimate.share()))
            return Text(f"about {format_seconds(estimate.left())} left", style="progress.remaining")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeLeft()
    )  # fmt: skip
    with Bars(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task(estimate.what, total=1.0)

        def report(what: str, done: int, total: int) -> None:
            nonlocal measurements, known
            before, known = known, kept()
            estimate.report(what, done, total, known > before)
            counted = f"{what} {done:,}/{total:,}"
            bars.update(task, description=counted, completed=min(0.999, estimate.share()))
            if done and what in measured and known == before:
                measurements += 1
                if measurements == MEASUREMENTS and (left := estimate.left()) > LONG:
                    warn(left)

        yield report
        bars.update(task, description="done", completed=1.0)
