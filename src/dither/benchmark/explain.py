"""What the plan expects of each use beside what it takes.

Measured is the time inside the rules' methods and the collectors' sums, by parameter: what a use costs on top of the
model's own forward and backward pass. A clock around every method makes small uses look a little dearer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dither.benchmark.models import Workload
from dither.benchmark.results import Explained
from dither.clipping import clipped_sum
from dither.clipping.gradients import Gradients


def explain(workload: Workload, strategy: str = "auto", *, steps: int = 5, warm_up: int = 17) -> list[Explained]:
    """Compare predicted and measured seconds of every use in one micro-batch.

    A parameter with several uses has its time on its first one, the others zero.

    Args:
        workload: model and data.
        strategy: of clipped_sum.
        steps: whose median counts.
        warm_up: before them; dither proves its gradients in the 1st, 2nd, 4th, 8th and 16th.
    """
    model, (batch,) = workload.build(), workload.batches(1)

    def losses() -> Tensor:
        return workload.losses(model(*batch.inputs), batch.target)

    for _ in range(warm_up):
        plan = clipped_sum(model, losses, strategy=strategy).plan
    taken: list[dict[str, float]] = []
    for _ in range(steps):
        with timed_parameters() as seconds:
            plan = clipped_sum(model, losses, strategy=strategy).plan
        taken.append(dict(seconds))
    found, seen = [], set()
    for use in plan.uses:
        measured = 0.0 if use.parameter in seen else statistics.median(t.get(use.parameter, 0.0) for t in taken)
        seen.add(use.parameter)
        predicted = getattr(use, "seconds", None)
        found.append(Explained(use.parameter, use.operation, use.strategy, use.held_bytes, predicted, measured))
    return found


@contextmanager
def timed_parameters() -> Iterator[dict[str, float]]:
    """Seconds by parameter name that gradients take to arrive, have their norms taken and be summed."""
    seconds: dict[str, float] = {}
    receive, start_up = Gradients.receive, Gradients.__init__

    def add(name: str, start: float) -> None:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def timed_receive(self: Gradients, use: Any, grad_output: Tensor) -> None:
        start = time.perf_counter()
        receive(self, use, grad_output)
        add(use.name, start)

    def timed_start(self: Gradients, *args: Any, **kwargs: Any) -> None:
        start_up(self, *args, **kwargs)
        for name, collector in self.collectors.items():
            for method in ("squared_norm", "add_weighted_sum"):
                setattr(collector, method, _clocked(getattr(collector, method), name, add))

    Gradients.receive, Gradients.__init__ = timed_receive, timed_start  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Gradients.receive, Gradients.__init__ = receive, start_up  # type: ignore[method-assign]


def _clocked(method: Callable[..., Any], name: str, add: Callable[[str, float], None]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        add(name, start)
        return result

    return run
