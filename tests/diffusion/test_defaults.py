"""Settings chosen from a data set's size and shape."""

from __future__ import annotations

import math

import pytest

from dither.diffusion.defaults import choose
from dither.diffusion.unet import DiffusersUNet, UNet


def _of(*arguments, **options):
    return {one.option: one.value for one in choose(*arguments, **options)}


@pytest.mark.parametrize("examples", [40, 999, 1000, 1437, 60_000, 1_281_167])
def test_delta_is_below_one_over_n_and_batches_fit(examples):
    chosen = _of(examples, 2, 28, 1, False)
    assert 0.1 / examples <= chosen["privacy.delta"] < 1 / examples
    assert 1 <= chosen["privacy.expected_batch_size"] <= examples / 2
    assert isinstance(chosen["privacy.steps"], int) and chosen["privacy.steps"] >= 150
    assert math.log10(chosen["privacy.delta"]) == pytest.approx(round(math.log10(chosen["privacy.delta"])))


def test_a_u_net_over_mixtures_where_classes_have_images_enough():
    small, large = _of(60_000, 10, 28, 1, False), _of(60_000, 10, 64, 3, False)
    assert small["model"] == "diffusers_unet" and small["warm_up.kind"] == "mixtures"
    assert small["warm_up.components"] == 20 and small["warm_up.centre"] == -1 and large["warm_up.centre"] == 0
    assert small["unet.patch_size"] == 2 and large["unet.patch_size"] == 4
    strict = _of(60_000, 10, 28, 1, False, epsilon=1.0)
    assert strict["privacy.expected_batch_size"] == 2 * small["privacy.expected_batch_size"]
    assert _of(4000, 10, 28, 1, False)["warm_up.components"] == 1
    assert _of(20_000, 10, 28, 1, False, epsilon=1.0)["warm_up.kind"] == "mixtures"
    for few in (_of(19_000, 10, 28, 1, False, epsilon=1.0), _of(1900, 10, 28, 1, False)):  # noise would drown them
        assert few.get("warm_up.kind") != "mixtures" and "model" not in few
    few, latents, odd = _of(900, 10, 28, 1, False), _of(60_000, 10, 16, 4, True), _of(60_000, 10, 27, 1, False)
    for chosen in (few, latents, odd):
        assert "model" not in chosen and chosen.get("warm_up.kind") != "mixtures"
    assert all(one.reason for one in choose(60_000, 10, 28, 1, False))
    wide, grey = _of(500, 10, 64, 3, False), _of(500, 10, 64, 1, False)  # 192 and 64 entries in a token of 64
    assert wide["recipe.prediction"] == latents["recipe.prediction"] == "sample"
    assert "recipe.prediction" not in grey


@pytest.mark.parametrize("side", [4, 8, 11, 12, 20, 24, 27, 28, 32, 40, 48, 64, 72, 96, 128])
def test_every_u_net_that_is_chosen_can_be_built(side):
    chosen = _of(60_000, 10, side, 3, False)
    if "unet.patch_size" in chosen:
        sizes = {name.removeprefix("unet."): value for name, value in chosen.items() if name.startswith("unet.")}
        assert DiffusersUNet(UNet(**sizes), side, 3, 10).input_size == side


def test_a_dit_that_was_asked_for():
    dit = {"model": "dit"}
    small, large = _of(60_000, 10, 28, 1, False, given=dit), _of(60_000, 10, 64, 3, False, given=dit)
    assert small["recipe.patch_size"] == 28 and small["recipe.prediction"] == "sample"
    assert small["warm_up.kind"] == "gaussians" and small["warm_up.centre"] == -1
    for chosen in (large, _of(60_000, 10, 16, 4, True, given=dit)):
        assert "recipe.patch_size" not in chosen and "warm_up.kind" not in chosen
    assert _of(60_000, 10, 32, 3, False, given=dit)["warm_up.centre"] == 0
    assert "warm_up.kind" not in _of(900, 10, 28, 1, False, given=dit)  # too few of each class


CLOTHES = (60_000, 10, 28, 1, False)


@pytest.mark.parametrize(
    ("name", "value"), [("recipe.patch_size", 7), ("recipe.hidden_size", 64), ("recipe.prediction", "v")]
)
def test_a_setting_of_another_model_leaves_the_rest_of_that_model(name, value):
    chosen = _of(*CLOTHES, given={name: value})
    assert not {"model", "recipe.patch_size", "recipe.hidden_size", "recipe.prediction"} & chosen.keys()
    assert chosen["warm_up.kind"] == "gaussians"


def test_giving_what_would_be_chosen_changes_nothing_else():
    everything = _of(*CLOTHES)
    for name, value in everything.items():
        batch = {"batch": value} if name == "privacy.expected_batch_size" else {}
        assert _of(*CLOTHES, given={name: value}, **batch) == {n: v for n, v in everything.items() if n != name}


def test_what_the_user_gave_decides():
    for name, value in {
        "recipe.learning_rate": 1e-3,
        "warm_up.share": 0.3,
        "unet.block_out_channels": (32, 64),
    }.items():
        chosen = _of(*CLOTHES, given={name: value})
        assert name not in chosen and chosen["warm_up.kind"] == "mixtures"
    assert "recipe.label_dropout" not in _of(*CLOTHES, given={"recipe.guidance": 2.0})
    assert "warm_up.share" not in _of(*CLOTHES, given={"warm_up.noise_multiplier": 2.0})
    for kind in ("gaussians", "none"):
        assert not any(name.startswith("warm_up") for name in _of(*CLOTHES, given={"warm_up.kind": kind}))
    assert not any(name.startswith("warm_up") for name in _of(*CLOTHES, epsilon=None))  # no budget to have a share of
    assert "model" not in _of(*CLOTHES, given={"pretrain.path": "public"}, public=True)
    smaller = _of(*CLOTHES, batch=600, given={"privacy.expected_batch_size": 600})
    assert smaller["privacy.steps"] == 1000 and "privacy.expected_batch_size" not in smaller


def test_of_another_model_only_what_the_number_of_images_decides():
    own = {"model": "my.Model"}
    assert _of(*CLOTHES, given=own) == {"privacy.delta": 1e-5}
    assert _of(*CLOTHES, given={"finetune.from": "dit.pt"}, public=True) == {"privacy.delta": 1e-5}
    assert _of(900, 2, 32, 3, False, given=own) == {"privacy.delta": 1e-3, "privacy.expected_batch_size": 450}
    both = own | {"privacy.delta": 1e-4, "privacy.expected_batch_size": 90}
    assert _of(900, 2, 32, 3, False, given=both) == {}
