"""Settings chosen from a data set's size and shape."""

from __future__ import annotations

import math

import pytest

from dither.diffusion.defaults import choose


def _of(*arguments, **options):
    return {f"{one.group}.{one.name}": one.value for one in choose(*arguments, **options)}


@pytest.mark.parametrize("examples", [40, 999, 1000, 1437, 60_000, 1_281_167])
def test_delta_is_below_one_over_n_and_batches_fit(examples):
    chosen = _of(examples, 2, 28, 1, False)
    assert 0.1 / examples <= chosen["privacy.delta"] < 1 / examples
    assert 1 <= chosen["privacy.expected_batch_size"] <= examples / 2
    assert isinstance(chosen["privacy.steps"], int) and chosen["privacy.steps"] >= 150
    assert math.log10(chosen["privacy.delta"]) == pytest.approx(round(math.log10(chosen["privacy.delta"])))


def test_by_shape():
    small, large, latents = _of(60_000, 10, 28, 1, False), _of(60_000, 10, 64, 3, False), _of(60_000, 10, 16, 4, True)
    assert small["recipe.patch_size"] == 28 and small["recipe.prediction"] == "sample"
    assert small["warm_up.kind"] == "gaussians" and small["warm_up.centre"] == -1
    for chosen in (large, latents):
        assert "recipe.patch_size" not in chosen and "warm_up.kind" not in chosen
    assert _of(60_000, 10, 32, 3, False)["warm_up.centre"] == 0
    assert "warm_up.kind" not in _of(900, 10, 28, 1, False)  # too few of each class
    assert all(one.reason for one in choose(60_000, 10, 28, 1, False))


def test_what_the_user_gave_decides():
    clothes = (60_000, 10, 28, 1, False)
    for name in ("model", "patch_size", "hidden_size", "prediction"):  # another model: none of it is changed
        chosen = _of(*clothes, given={f"recipe.{name}"})
        assert not {"recipe.patch_size", "recipe.hidden_size", "recipe.prediction"} & chosen.keys()
        assert "warm_up.kind" in chosen
    assert not any(name.startswith("warm_up") for name in _of(*clothes, given={"warm_up.kind"}))
    assert not any(name.startswith("warm_up") for name in _of(*clothes, epsilon=None))  # no budget to have a share of
    smaller = _of(*clothes, batch=600, given={"privacy.expected_batch_size"})
    assert smaller["privacy.steps"] == 2000 and "privacy.expected_batch_size" not in smaller


def test_of_another_model_only_what_the_number_of_images_decides():
    assert _of(60_000, 10, 28, 1, False, of_recipe=False) == {"privacy.delta": 1e-5}
    assert _of(900, 2, 32, 3, False, of_recipe=False) == {"privacy.delta": 1e-3, "privacy.expected_batch_size": 450}
    assert _of(900, 2, 32, 3, False, of_recipe=False, given={"privacy.delta", "privacy.expected_batch_size"}) == {}
