"""No row of trust.md is forgotten: each names its tests, and the tests exist.

The lists are this repository's own copy of trust.md's two lists of cases.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ROWS: dict[str, tuple[str, ...]] = {
    "Linear on 4-D input": (
        "clipping/test_trust.py::test_linear_on_four_dimensions_and_more",
        "clipping/test_trust.py::test_linear_on_four_dimensions_after_three",
    ),
    "parameter on the top module, several inputs": (
        "clipping/test_trust.py::test_parameter_on_the_top_module_with_several_inputs",
    ),
    "kwargs-only call into a module that owns parameters": (
        "clipping/test_trust.py::test_keyword_arguments_alone",
        "clipping/test_module_inputs.py::test_inputs_in_any_container",
    ),
    "optional second tensor input": (
        "clipping/test_trust.py::test_optional_second_tensor_given_left_out_and_given_again",
    ),
    "int, bool, None arguments": ("clipping/test_trust.py::test_integers_booleans_none_and_strings",),
    "tied weights": ("clipping/test_trust.py::test_tied_weights", "clipping/test_parameter_views.py::test_shared"),
    "dropout inside a custom module": (
        "clipping/test_trust.py::test_dropout_inside_a_custom_module_with_the_mask_that_was_drawn",
    ),
    "wrapped in eval, then train()": ("clipping/test_trust.py::test_eval_then_train",),
    "one NaN or Inf example": (
        "clipping/test_trust.py::test_an_example_that_is_not_finite_is_dropped_and_counted",
        "test_training.py::test_a_poisoned_example_is_dropped_and_counted",
        "opacus/test_hooks.py::test_an_example_that_is_not_finite_is_left_out",
    ),
    "parameter unused on a later step": (
        "clipping/test_trust.py::test_parameter_unused_on_a_later_step_contributes_zero",
    ),
    "tuple or dict outputs of custom modules": (
        "clipping/test_trust.py::test_tuple_and_dict_outputs_of_custom_modules",
        "clipping/test_module_inputs.py::test_outputs_in_any_container",
    ),
    "module call plus F.linear on the same weight": (
        "clipping/test_trust.py::test_module_call_and_functional_on_the_same_weight",
    ),
    "convolution on channels_last input (diffusers UNet2D hits it)": (
        "clipping/test_trust.py::test_convolution_on_channels_last",
        "clipping/test_real_models.py::test_real_model",
    ),
    "parameter unfrozen after wrapping": (
        "clipping/test_trust.py::test_parameter_unfrozen_and_frozen_later",
        "opacus/test_hooks.py::test_a_parameter_unfrozen_and_a_layer_added_after_wrapping",
    ),
    "layer added after wrapping": ("clipping/test_trust.py::test_layer_added_later",),
    "activation checkpointing, non-reentrant": ("clipping/test_trust.py::test_activation_checkpoints_are_exact",),
    "batch statistics in the model or the loss": (
        "clipping/test_trust.py::test_batch_statistics_in_the_model_are_refused",
        "clipping/test_trust.py::test_batch_statistics_without_a_batch_norm_are_refused",
        "clipping/test_trust.py::test_batch_statistics_in_the_loss_are_refused",
        "opacus/test_hooks.py::test_batch_norm_is_refused_before_training",
    ),
    "scalar loss in ghost mode": (
        "clipping/test_trust.py::test_scalar_loss_is_refused",
        "test_training.py::test_losses_that_are_not_one_an_example_are_refused",
    ),
    "second backward before step": (
        "clipping/test_trust.py::test_second_pass_before_the_step_accumulates",
        "opacus/test_hooks.py::test_accumulation_keeps_batches_apart_and_zero_grad_clears",
    ),
    "user seeds; resume": (
        "test_training.py::test_resume_never_repeats_noise_or_batches",
        "test_noise.py::test_a_seed_repeats_by_step_and_is_not_private",
        "test_sampling.py::test_seeded_batches_repeat_by_step_and_unseeded_never",
        "clipping/test_published.py::test_a_user_seed_repeats_neither_noise_nor_batches_in_another_run",
    ),
}

PUBLISHED: dict[str, tuple[str, ...]] = {
    "shuffled batches accounted as Poisson": ("test_sampling.py::test_each_example_enters_independently_at_the_rate",),
    "divisor = actual batch size": (
        "test_training.py::test_the_update_is_the_clipped_sum_over_the_expected_batch_size",
    ),
    "divisor or rate from the loader's length": (
        "test_training.py::test_the_update_is_the_clipped_sum_over_the_expected_batch_size",
        "clipping/test_published.py::test_rate_and_divisor_come_from_public_constants",
    ),
    "noise after averaging": ("test_training.py::test_noise_is_drawn_once_a_logical_batch_at_the_claimed_scale",),
    "empty batch skipped": ("test_training.py::test_an_empty_batch_takes_a_noisy_step",),
    "noise per micro-batch": ("test_training.py::test_noise_is_drawn_once_a_logical_batch_at_the_claimed_scale",),
    "clip of a micro-batch sum": (
        "test_training.py::test_the_update_is_the_clipped_sum_over_the_expected_batch_size",
        "clipping/test_published.py::test_each_example_is_clipped_not_their_sum",
    ),
    "per-layer clipping with the wrong total sensitivity": (
        "clipping/test_published.py::test_every_clipping_function_keeps_the_sensitivity_it_states",
    ),
    "clip bound ignored": ("clipping/test_published.py::test_the_clip_bound_is_obeyed",),
    "fp16 norm overflow": ("clipping/test_precision.py::test_half_precision_norms_do_not_overflow",),
    "augmentation counted as several examples": (
        "clipping/test_published.py::test_augmentations_of_one_example_are_one_example",
        "clipping/test_clipped_sum.py::test_rows_per_example_is_checked_against_what_is_found",
    ),
    "buffers updated from data": ("clipping/test_buffers.py::test_buffer_updated_in_place_from_data_is_refused",),
    "accountant and sampler of different neighbouring relations": (
        "test_training.py::test_the_certificate_says_what_holds",
        "test_sampling.py::test_each_example_enters_independently_at_the_rate",
    ),
    "accountant numerics (cross-check PLD, PRV, RDP)": ("accounting/test_accounting.py::test_other_accountants_agree",),
    "label histogram of private data used at synthesis": (
        "cli/test_sample.py::test_the_histogram_of_the_private_labels_is_in_nothing_that_is_drawn",
    ),
    "float grid attacks on the noise": ("test_noise.py::test_noise_is_added_in_float64_and_rounded_once",),
}

NOT_BUILT = {
    "the same Poisson mask on every rank": "dither.distributed",
    "noise scale wrong by sqrt(ranks)": "dither.distributed",
}
"""Published failures of features that do not exist yet, with the module whose arrival makes the test due."""


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_trust_has_twenty_rows_and_eighteen_published_failures():
    assert len(ROWS) == 20
    assert len(PUBLISHED) + len(NOT_BUILT) == 18


@pytest.mark.parametrize("row", [*ROWS, *PUBLISHED])
def test_row_has_its_tests(row):
    named = {**ROWS, **PUBLISHED}[row]
    assert named
    for test in named:
        file, name = test.split("::")
        assert name in functions_of(TESTS / file), test


@pytest.mark.parametrize("failure", NOT_BUILT)
def test_a_feature_that_arrives_needs_its_guard(failure):
    assert importlib.util.find_spec(NOT_BUILT[failure]) is None, f"write the guard against: {failure}"
