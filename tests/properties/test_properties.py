"""Generated models: every outcome is equal to the oracle, or a named refusal. `sweep.py` runs thousands more."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from properties.checking import FUNCTIONS, STRATEGIES, Check, check
from properties.models import random_program
from properties.program import OPERATIONS, Program
from properties.structure import STRUCTURE
from properties.wrong import MIXES, WRONG_LOSSES

RANDOM = st.randoms(use_true_random=False)
steady = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def assert_exact_or_refused(program: Program, function: str) -> None:
    note(f"\nB = {program.batch}; wrong on purpose: {program.wrong or 'no'}; {function}\n{program.source}\n")
    for name in ("gradients", "norms", function):
        (outcome,) = check(program, [name])
        assert outcome.kind != "failed", f"{name}: {outcome.why}: {outcome.detail}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(steady, max_examples=48)
@given(random=RANDOM)
def test_a_model_is_exact_or_refused_by_name(strategy, random):
    assert_exact_or_refused(random_program(random), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(steady, max_examples=12)
@given(random=RANDOM)
def test_a_model_that_mixes_examples_is_refused_by_name(strategy, random):
    assert_exact_or_refused(random_program(random, wrong=True), strategy)


def test_the_generator_reaches_every_operation():
    found: set[str] = set()
    for seed in range(4000):
        program = random_program(Random(seed), wrong=seed % 2 == 0)
        found |= {*program.names, program.wrong}
    assert {made.name for made in (*OPERATIONS, *STRUCTURE, *MIXES)} | WRONG_LOSSES.keys() <= found


def test_models_are_exact_more_often_than_refused():
    outcomes = [check(random_program(Random(seed)), ["auto"], neighbours=False)[0] for seed in range(60)]
    exact = sum(outcome.kind == "exact" for outcome in outcomes)
    assert exact >= 40, [outcome.why for outcome in outcomes]


def test_a_wrong_gradient_would_be_noticed():
    """The same model with another weight stands in for a wrong library."""
    checked = Check(random_program(Random(1)))
    assert checked.run("auto").kind == "exact"
    next(iter(checked.double.model.parameters())).data += 1e-6
    assert [checked.run(function).kind for function in FUNCTIONS] == ["failed"] * len(FUNCTIONS)
