"""Nothing that dither computes is rounded to less than float32 on its way to a sum: the noise is for the bound."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

import dither
from clipping.test_exactness import STRATEGIES, Function
from dither.errors import ConfigurationError
from dither.precision import FullPrecision
from dither.rules import register_rule
from dither.rules.linear import LinearWeight
from dither.rules.rule import add_weighted

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
SLACK = 1e-4
"""Of float32 sums, relative to the bound; bfloat16 rounds to 4e-3 of the whole sum."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Each takes x (B, 8, 16), and parameters of the shapes that follow.
OPERATIONS = {
    "linear": (lambda x, w: F.linear(x, w), {"w": (64, 16)}),
    "product": (lambda x, w: torch.einsum("btd,dp->btp", x, w), {"w": (16, 64)}),
    "heads": (lambda x, w: torch.einsum("bthd,hdp->bthp", x.unflatten(2, (4, 4)), w), {"w": (4, 4, 16)}),
    "convolution": (lambda x, w: F.conv1d(x, w), {"w": (64, 8, 3)}),
    "transposed convolution": (lambda x, w: F.conv_transpose1d(x, w), {"w": (8, 64, 3)}),
    "table": (lambda x, w: F.embedding((x[:, :, 0] > 0).long(), w), {"w": (2, 64)}),
    "offset": (lambda x, w: x + w, {"w": (8, 16)}),
    "scale": (lambda x, w: x * w, {"w": (16,)}),
    "used twice": (lambda x, w: F.linear(x, w) + F.linear(x.flip(1), w), {"w": (64, 16)}),
    "no rule": (lambda x, w: torch.cdist(x.float(), w.float()), {"w": (4, 16)}),
}


@HALF
@each_strategy
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_example_among_many_moves_the_sum_by_the_bound_at_most(name, strategy, dtype):
    """513 examples of nearly the same gradient: the sum's last place in half precision is more than the bound."""
    body, shapes = OPERATIONS[name]
    model = Function(body, **shapes).to(dtype)
    x = (torch.rand(1, 8, 16) + 0.5 + 0.01 * torch.randn(513, 8, 16)).to(dtype)
    out = torch.randn(model(x[:1]).shape[1:])

    def total(count):
        def losses():
            return (model(x[:count]).float() * out).flatten(1).sum(1) * 100

        return dither.clipped_sum(model, losses, strategy=strategy).gradients

    more, fewer = total(513), total(512)
    moved = sum((more[n].double() - fewer[n].double()).square().sum() for n in more).sqrt()
    assert all(gradient.dtype == torch.float32 for gradient in more.values())
    assert 1 - SLACK <= float(moved) <= 1 + SLACK


@each_strategy
@pytest.mark.parametrize("name", OPERATIONS)
def test_clip_factors_that_float16_cannot_hold_are_not_rounded(name, strategy):
    """3.2e-8 becomes 6e-8, the smallest number of float16."""
    body, shapes = OPERATIONS[name]
    model, x = Function(body, **shapes).half(), torch.rand(1, 8, 16).half()

    def losses():
        return model(x).float().flatten(1).sum(1) * 500

    bound = float(dither.per_example_norms(model, losses)) * 3.2e-8
    found = dither.clipped_sum(model, losses, max_grad_norm=bound, strategy=strategy).gradients
    size = float(sum(g.double().square().sum() for g in found.values()).sqrt()) / bound
    assert 1 - SLACK <= size <= 1 + SLACK


@HALF
@each_strategy
@pytest.mark.parametrize("apart", [0.1, 0.03, 0.01])
def test_rows_in_half_precision_that_cancel_in_part(apart, strategy, dtype):
    """Of 2048 rows a tenth to a hundredth is left: norms from products of rows and sums round alike, in float32."""
    model = nn.Linear(8, 8, bias=False).to(dtype)
    x, c = torch.randn(1, 1024, 8), torch.randn(1, 1024, 8)
    rows = torch.cat([x, x + apart * torch.randn_like(x)], 1).to(dtype)
    signs = torch.cat([c, -c], 1)
    found = dither.clipped_sum(
        model, lambda: (model(rows).float() * signs).flatten(1).sum(1), max_grad_norm=0.01, strategy=strategy
    )
    size = float(found.gradients["weight"].double().norm()) / 0.01
    assert 1 - SLACK <= size <= 1 + SLACK


@HALF
def test_running_sums_in_half_precision_are_refused(dtype):
    model, x = nn.Linear(1, 1, bias=False).to(dtype), torch.ones(3, 1, dtype=dtype)
    with pytest.raises(ConfigurationError, match="float32"):
        dither.clipped_sum(model, lambda: model(x).sum(1), into={"weight": torch.zeros(1, 1, dtype=dtype)})
    total = dither.clipped_sum(model, lambda: model(x).sum(1)).gradients
    again = dither.clipped_sum(model, lambda: model(x).sum(1), into=total).gradients
    assert again["weight"] is total["weight"] and float(total["weight"]) == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("entries", [0, 1, 700, (1 << 20) + 3])
def test_weighted_sums_of_gradients_in_half_precision(entries, contiguous):
    gradients, weights = torch.randn(2, entries, 2).bfloat16(), torch.rand(2, dtype=torch.float64)
    into = torch.randn(entries, 2) if contiguous else torch.randn(2, entries).T
    expected = into.double() + torch.einsum("b,b...->...", weights, gradients.double())
    add_weighted(gradients, weights, into)
    torch.testing.assert_close(into.double(), expected, rtol=0, atol=1e-6)


@each_strategy
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_autocast_around_the_call_rounds_neither_norms_nor_sums(name, strategy):
    body, shapes = OPERATIONS[name]
    model, x = Function(body, **shapes), torch.randn(1, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dither.clipped_sum(
            model, lambda: model(x).float().square().flatten(1).sum(1), max_grad_norm=1e-3, strategy=strategy
        ).gradients
        assert torch.is_autocast_enabled("cpu")
    size = float(sum(g.double().square().sum() for g in found.values()).sqrt()) / 1e-3
    assert 1 - 1e-5 <= size <= 1 + 1e-5


@each_strategy
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_convolution_under_autocast_is_summed_from_the_input_of_its_norm(kind, strategy):
    """Inputs a little less than half way between two numbers of bfloat16: rounding them moves all one way."""
    model, x = kind(8, 64, 3, bias=False), 1 + 2**-9 * (0.9 + 0.05 * torch.rand(1, 8, 16))

    def losses():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().flatten(1).sum(1)

    found = dither.clipped_sum(model, losses, max_grad_norm=1e-3, strategy=strategy).gradients["weight"]
    assert float(found.double().norm()) == pytest.approx(1e-3, rel=1e-5)


def test_long_examples_under_an_autocast_around_the_call():
    model = nn.Linear(256, 256, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in torch.randn(5, 1, 1024, 256):

            def losses(x=x):
                return model(x).float().square().flatten(1).sum(1)

            found = dither.clipped_sum(model, losses, strategy="ghost").gradients["weight"]
            assert float(found.double().norm()) <= 1 + 1e-5


def _settings():
    """What torch tells of them; where older and newer form disagree it refuses."""
    backends = torch.backends
    read = {
        "older": torch.get_float32_matmul_precision,
        "older, products on CUDA": lambda: backends.cuda.matmul.allow_tf32,
        "older, convolutions on CUDA": lambda: backends.cudnn.allow_tf32,
    }
    if hasattr(backends.mkldnn, "matmul"):
        read |= {
            "all": lambda: backends.fp32_precision,
            "products": lambda: backends.mkldnn.matmul.fp32_precision,
            "convolutions": lambda: backends.mkldnn.conv.fp32_precision,
            "products on CUDA": lambda: backends.cuda.matmul.fp32_precision,
            "convolutions on CUDA": lambda: backends.cudnn.conv.fp32_precision,
        }
    found = {}
    for name, setting in read.items():
        try:
            found[name] = setting()
        except RuntimeError:
            found[name] = "mixed"
    return found


def _older(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def _newer(precision, *path):
    def change():
        place = torch.backends
        for name in path:
            place = getattr(place, name)
        place.fp32_precision = precision

    return change


def _both():
    _older("high")()
    _newer("ieee", "cuda", "matmul")()


NEWER = pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch 2.9 has these settings")
REDUCED = [
    pytest.param(_older("medium"), id="medium"),
    pytest.param(_older("high"), id="high"),
    pytest.param(_newer("bf16", "mkldnn", "matmul"), id="products", marks=NEWER),
    pytest.param(_newer("bf16", "mkldnn", "conv"), id="convolutions", marks=NEWER),
    pytest.param(_newer("bf16", "mkldnn"), id="oneDNN", marks=NEWER),
    pytest.param(_newer("tf32"), id="all", marks=NEWER),
    pytest.param(_both, id="both", marks=NEWER),
]


@contextmanager
def _put_back():
    """The settings are the process's: whatever a test sets is undone."""
    with ExitStack() as stack:
        if hasattr(torch.backends.mkldnn, "matmul"):
            for path in (("cuda", "matmul"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn",), ()):
                stack.callback(_newer("none", *path))
        stack.callback(_older("highest"))
        yield


def _is_full():
    """Whether products and convolutions of float32 on the CPU are in float32."""
    now = _settings()
    if "products" not in now:
        return now["older"] == "highest"
    return {now["products"], now["convolutions"]} <= {"none", "ieee"}


def watched(x, w):
    """A linear map whose rule says at which precision it was asked."""
    if has_torch_function((x, w)):
        return handle_torch_function(watched, (x, w), x, w)
    return F.linear(x, w)


class Watched(LinearWeight):
    asked: list[tuple[str, bool, bool]]

    def _note(self, what):
        self.asked.append((what, _is_full(), torch.is_autocast_enabled("cpu")))

    def per_example_gradient(self, use, grad_output, out=None):
        self._note("gradient")
        return super().per_example_gradient(use, grad_output, out)

    def squared_norm(self, use, grad_output):
        self._note("norm")
        return super().squared_norm(use, grad_output)

    def tile_squared_norm(self, use, grad_output):
        self._note("norm")
        return super().tile_squared_norm(use, grad_output)

    def add_weighted_sum(self, use, grad_output, weights, into):
        self._note("sum")
        super().add_weighted_sum(use, grad_output, weights, into)


RULE = Watched()
register_rule(watched, ("input", "weight"), {"weight": RULE})


@each_strategy
@pytest.mark.parametrize("reduce", REDUCED)
def test_settings_that_reduce_products_of_float32_are_the_model_s_alone(reduce, strategy):
    model, x, seen = Function(watched, w=(4, 8)), torch.randn(3, 6, 8), []
    RULE.asked = []
    with _put_back():
        reduce()
        before = _settings()

        def losses():
            seen.append(_settings())
            return model(x).square().flatten(1).sum(1)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            dither.clipped_sum(model, losses, strategy=strategy)
            dither.per_example_norms(model, losses)
        assert all(settings == before for settings in [*seen, _settings()])
    assert {what for what, *_ in RULE.asked} >= ({"gradient"} if strategy == "hold" else {"norm"})
    assert all(full and not autocast for _, full, autocast in RULE.asked)


@pytest.mark.parametrize("reduce", REDUCED)
def test_settings_come_back_after_an_error(reduce):
    with _put_back():
        reduce()
        before = _settings()
        with pytest.raises(KeyError), FullPrecision():
            assert _is_full()
            raise KeyError
        assert _settings() == before


@pytest.mark.parametrize("first", [0, 1])
def test_the_last_thread_to_leave_puts_the_settings_back(first):
    """Two threads, inside at the same time; either leaves first."""
    inside, leave, full = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()], []

    def work(number):
        with FullPrecision():
            inside[number].set()
            leave[number].wait(10)
            full.append(_is_full())

    with _put_back():
        _older("medium")()
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread, entered in zip(threads, inside, strict=True):
            thread.start()
            assert entered.wait(10)
        leave[first].set()
        threads[first].join()
        assert _is_full()
        leave[1 - first].set()
        threads[1 - first].join()
        assert torch.get_float32_matmul_precision() == "medium"
    assert full == [True, True]


def test_nothing_is_changed_where_nothing_is_reduced():
    with _put_back():
        before = _settings()
        with FullPrecision(), FullPrecision():
            assert _settings() == before


@pytest.mark.parametrize("strategy", ["ghost", "tile", "two_pass"])
def test_gradients_beyond_float16_of_a_batch_with_a_dropped_example(strategy):
    """Then gradients are formed for the sum; of an example whose norm float32 holds, they have to fit as well."""
    model, x = nn.Linear(16, 16, bias=False).half(), torch.randn(4, 6, 16).half()
    scale = torch.tensor([1.0, float("inf"), 3.0, 6e4])

    def losses(rows):
        return (model(x[rows]).float().flatten(1).sum(1)) * scale[rows]

    every = dither.clipped_sum(model, lambda: losses([0, 1, 2, 3]), strategy=strategy)
    fewer = dither.clipped_sum(model, lambda: losses([0, 1, 2]), strategy=strategy)
    assert every.dropped == fewer.dropped == 1 and float(every.norms[3]) > 1e5
    moved = (every.gradients["weight"].double() - fewer.gradients["weight"].double()).norm()
    assert 1 - SLACK <= float(moved) <= 1 + SLACK
