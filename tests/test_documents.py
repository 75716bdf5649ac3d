"""The code blocks of README.md, CONTRIBUTING.md and the guides run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dither
from dither.rules import rule

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    """The unindented Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    return {"model": model, "x": x, "y": y, "F": F, "dither": dither}


def test_readme_training(small, capsys):
    code = blocks("README.md")[1]
    names = {
        **small,
        "optimizer": torch.optim.Adam(small["model"].parameters()),
        "dataset": TensorDataset(small["x"], small["y"]),
        "loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    }
    code = code.replace("steps=1000)", "steps=3, expected_batch_size=10)")
    exec(code, names)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_readme_opacus(opacus_names):
    names: dict = {}
    exec(blocks("README.md")[0], names)
    assert names["PrivacyEngine"] is opacus_names["PrivacyEngine"]


def test_readme_clipped_sum(small):
    names = dict(small)
    exec(blocks("README.md")[2], names)
    assert names["result"].norms.shape == (40,)
    assert names["result"].sensitivity == 1.0


def test_contributing_rule():
    names: dict = {}
    before = dict(rule._TABLE)
    try:
        exec(blocks("CONTRIBUTING.md")[0], names)
        asked = []
        original = names["Codebook"].per_example_gradient
        names["Codebook"].per_example_gradient = lambda self, *a, **k: asked.append(1) or original(self, *a, **k)
        model = nn.ParameterDict({"points": torch.randn(6, 5, dtype=torch.float64)})
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        x[1, 2] = model["points"][4].detach()  # a distance of zero
        assert dither.verify(model, lambda: torch.cdist(x, model["points"]).square().sum((1, 2))).exact
        assert dither.verify(model, lambda: torch.cdist(x, model["points"]).cos().sum((1, 2))).exact
        time_first = x.transpose(0, 1)
        assert dither.verify(model, lambda: torch.cdist(time_first, model["points"]).cos().sum((0, 2))).exact
        assert asked
    finally:
        rule._TABLE.clear()
        rule._TABLE.update(before)


def test_exactness(capsys):
    torch.manual_seed(0)
    names: dict = {}
    for code in blocks("docs/exactness.md"):
        exec(code, names)
    printed = capsys.readouterr().out
    assert "through an input, shape (4, 3)" in printed
    assert printed.count("exact: every example's gradient is its own") == 2
    assert printed.splitlines()[-1] == "1.0"
    with pytest.raises(names["CoupledExamplesError"]):
        dither.clipped_sum(names["model"], lambda: names["restored"](names["raw"]))


def test_native(capsys):
    names: dict = {}
    for code in blocks("docs/native.md"):
        exec(code, names)
    assert capsys.readouterr().out.startswith("step 1: epsilon ")
    assert names["certificate"]["steps_done"] == 4
    assert names["certificate"]["private"]


@pytest.fixture
def opacus_names():
    """What the guides assume: a model of three inputs, its optimizer and a loader."""
    import dither.opacus

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.label, self.gain = nn.Linear(6, 6), nn.Embedding(4, 6), nn.Parameter(torch.ones(6))

        def forward(self, x, t, *, y):
            return (self.image(x) * self.gain + self.label(y)) * t[:, None]

    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(40, 6), torch.rand(40), torch.randint(4, (40,)))
    model, plain_model = Conditional(), Conditional()
    yield {
        **{name: getattr(dither.opacus, name) for name in dither.opacus.__all__},
        "F": F,
        "nn": nn,
        "dither": dither,
        "dataset": dataset,
        "model": model,
        "plain_model": plain_model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "plain_optimizer": torch.optim.SGD(plain_model.parameters(), lr=0.1),
        "train_loader": DataLoader(dataset, batch_size=8),
    }
    dither.opacus.uninstall()


@pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:.*Optimal order")
@pytest.mark.parametrize("document", ["docs/from-opacus.md", "docs/flash-clipping.md"])
def test_opacus_guides(document, opacus_names, capsys):
    before = [p.detach().clone() for p in opacus_names["model"].parameters()]
    found = [code for code in blocks(document) if code.strip()]
    assert len(found) >= 3
    for code in found:
        exec(code, opacus_names)
    assert all(not torch.equal(a, b) for a, b in zip(before, opacus_names["model"].parameters(), strict=True))
    if document.endswith("from-opacus.md"):
        assert len(capsys.readouterr().out.splitlines()) == 3
        assert opacus_names["result"].norms.shape == (16,)
    else:
        assert isinstance(opacus_names["criterion"], opacus_names["DPLossFastGradientClipping"])
        assert opacus_names["squared_error"](torch.ones(3, 2, 2), torch.zeros(3, 2, 2)).shape == (3,)
