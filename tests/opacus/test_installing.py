"""`install()` whatever the import order, `uninstall()`, and `python -m dither.opacus`: real processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import opacus
import opacus.grad_sample
import opacus.optimizers
import pytest
import torch
from opacus import GradSampleModule as EarlyGradSampleModule
from torch import nn

import dither.opacus
from dither.opacus import GradSampleModule as OurGradSampleModule
from dither.opacus import installing

MODEL = """
import torch, torch.nn.functional as F
from torch import nn

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    def forward(self, x, t):
        return self.layer(x) * self.scale * t[:, None]

def works(kind):
    wrapped = kind(TwoInputs())
    wrapped(torch.randn(4, 3), torch.randn(4)).sum().backward()
    return all(p.grad_sample.shape == (4, *p.shape) for p in wrapped.parameters())
"""


@pytest.fixture
def run(programs):
    """Run code in a process that has imported neither library yet."""
    return lambda code: programs.run("-c", MODEL + textwrap.dedent(code))


@pytest.mark.parametrize(
    "code",
    [
        """
        import dither.opacus
        dither.opacus.install()
        from opacus import GradSampleModule
        assert works(GradSampleModule)
        """,
        """
        from opacus import GradSampleModule
        import dither.opacus
        dither.opacus.install()
        assert works(GradSampleModule)
        """,
        """
        def inside():
            from opacus import GradSampleModule
            import dither.opacus
            dither.opacus.install()
            return works(GradSampleModule)
        assert inside()
        """,
        """
        import opacus.grad_sample.grad_sample_module as deep
        import dither.opacus
        with dither.opacus.install():
            assert works(deep.GradSampleModule)
        try:
            works(deep.GradSampleModule)
        except TypeError:
            pass
        else:
            raise AssertionError("stock Opacus takes one input")
        """,
    ],
    ids=["before", "after", "in a function", "by module, and undone"],
)
def test_any_import_order(run, code):
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_every_name_is_replaced_and_put_back():
    before = {name: getattr(opacus, name) for name in ("PrivacyEngine", "GradSampleModule")}
    with dither.opacus.install():
        assert dither.opacus.installed()
        assert opacus.PrivacyEngine is dither.opacus.PrivacyEngine
        assert opacus.GradSampleModule is dither.opacus.GradSampleModule is EarlyGradSampleModule
        assert opacus.optimizers.DPOptimizer is dither.opacus.DPOptimizer
        for mode in ("hooks", "functorch", "ew", "ghost", "no_op"):
            assert issubclass(opacus.grad_sample.get_gsm_class(mode), getattr(dither.opacus, _class_of(mode)))
        dither.opacus.install()  # twice is once
    assert not dither.opacus.installed()
    assert {name: getattr(opacus, name) for name in before} == before
    assert type(EarlyGradSampleModule(nn.Linear(2, 2))) is before["GradSampleModule"]
    dither.opacus.uninstall()  # and again is nothing


def test_names_imported_from_here_survive_uninstall():
    ours = OurGradSampleModule
    with dither.opacus.install():
        pass
    assert OurGradSampleModule is ours is dither.opacus.GradSampleModule


def _class_of(mode: str) -> str:
    kinds = {"ew": "ExpandedWeights", "ghost": "FastGradientClipping", "no_op": "NoOp"}
    return "GradSampleModule" + kinds.get(mode, "")


def test_replacements_are_subclasses_with_the_same_signature():
    import inspect

    for stock, ours in installing.CLASSES.items():
        assert issubclass(ours, stock)
        theirs, here = (inspect.signature(kind.__init__).parameters for kind in (stock, ours))
        taken = set(here) | ({*theirs} if any(p.kind is p.VAR_KEYWORD for p in here.values()) else set())
        assert set(theirs) <= taken, (stock, ours)


def test_a_copy_of_a_stock_module_stays_stock():
    import copy

    wrapped = EarlyGradSampleModule(nn.Linear(3, 2))
    with dither.opacus.install():
        assert type(copy.deepcopy(wrapped)) is type(wrapped)


def test_registered_samplers_are_shared_with_opacus():
    class Doubled(nn.Linear):
        pass

    def sampler(layer, activations, backprops):
        gradients = torch.einsum("n...i,n...j->nij", backprops, activations[0])
        return {layer.weight: 2 * gradients, layer.bias: 2 * backprops}

    opacus.grad_sample.register_grad_sampler(Doubled)(sampler)
    try:
        model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 2), nn.Linear(2, 2))
        x = torch.randn(4, 3)
        plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        wrapped = dither.opacus.GradSampleModule(model, loss_reduction="sum")
        wrapped(x).sum().backward()
        for index, (parameter, gradient) in enumerate(zip(model.parameters(), plain, strict=True)):
            torch.testing.assert_close(parameter.grad_sample.sum(0), gradient * (2 if index in (2, 3) else 1))
    finally:
        del dither.opacus.GradSampleModule.GRAD_SAMPLERS[Doubled]


# --- python -m dither.opacus -----------------------------------------------------------------


SCRIPT = (
    MODEL
    + """
import sys
from opacus import GradSampleModule
if __name__ == "__main__":
    print("works" if works(GradSampleModule) else "fails", sys.argv, __file__)
    sys.exit(int(sys.argv[2]))
"""
)


@pytest.fixture
def main(programs):
    """Run `python -m dither.opacus`."""
    return lambda *arguments, cwd=None: programs.run("-m", "dither.opacus", *arguments, cwd=cwd)


def test_a_script_runs_unmodified(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("")
    script = tmp_path / "scripts" / "train.py"
    script.write_text("import beside\n" + SCRIPT)
    command = [sys.executable, "-m", "dither.opacus", "scripts/train.py", "--epochs", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stdout.split() == ["works", f"['{script}',", "'--epochs',", "'3']", str(script)]


def test_a_module_runs_unmodified(main, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(SCRIPT)
    result = main("-m", "package.train", "--epochs", "0", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("works"), result.stderr


def test_help_and_mistakes_are_told_in_words(main, tmp_path):
    assert "examples:" in main("--help").stdout
    missing = main(str(tmp_path / "none.py"))
    assert missing.returncode == 2 and "there is no file" in missing.stderr and "Traceback" not in missing.stderr
    assert main().returncode == 2
