"""What `dither verify` is pointed at: a user's factory, or a run folder; found, called and checked."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dither.cli.subject import Subject, users_code
from dither.errors import ConfigurationError

CONTRACT = (
    "a factory takes nothing and returns (model, batch) or (model, batch, loss_fn); loss_fn(model, batch) gives one "
    "loss per example, shape (B,)"
)


def from_factory(name: str) -> Subject:
    """Call the factory that `module:factory` or `path/to/file.py:factory` names.

    Raises:
        ConfigurationError: it is not found, fails, or returns something else than the contract says.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigurationError(
            f"{name!r} is neither a run folder nor module:factory nor path/to/file.py:factory",
            fix=f"name the function too, e.g. {name.rstrip(':') or 'model.py'}:make",
        )
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    factory = getattr(module, attribute, None)
    if factory is None:
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigurationError(
            f"{where} has no {attribute!r}", fix=f"it has: {', '.join(own) or 'no function of its own'}; {CONTRACT}"
        )
    if not callable(factory):
        raise ConfigurationError(f"{name} is a {type(factory).__name__}, not a function", fix=CONTRACT)
    with users_code(f"the factory {name}", CONTRACT):
        made = factory()
    return _check(name, made)


def from_run(path: Path, count: int) -> Subject:
    """The model and loss of a finished run of `dither train`, and some of the examples it was trained on.

    Args:
        path: the run folder.
        count: number of examples; 0 for all.

    Raises:
        RunFolderError: no run folder, unfinished or damaged.
    """
    from dither.cli.data import check_there, read_data
    from dither.cli.models import run_model
    from dither.cli.reading import read_run_options
    from dither.cli.results import load
    from dither.cli.run_folder import RunFolder
    from dither.diffusion.recipe import build_loss

    folder = RunFolder.open(path)
    options, images = read_run_options(folder.config), folder.images
    model = run_model(folder, options)
    load(model, folder.load_weights("model"))
    check_there(options.data, folder.config)
    data = read_data(options.data)
    chosen = data.batch(torch.randperm(len(data))[: count or None])
    return Subject(model, chosen, build_loss(options.recipe, images.num_classes))


class DefaultLoss:
    """One number per example from whatever floating-point tensors a model returns.

    An example's loss is the mean of w y + y^2 / 2 over its own entries of each tensor, which are those at its index on
    axis 0; w are the cosines of 1, 2, 3..., so that no entry's gradient is zero by symmetry.

    Attributes:
        words: what was used and what was left out, once called.
    """

    def __init__(self) -> None:
        self.words = ""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The losses, (B,)."""
        output = _call(model, batch)
        found = {name: t for name, t in _named_tensors(output, "output") if t.is_floating_point() or t.is_complex()}
        used = {name: t for name, t in found.items() if t.dim() > 0 and 0 not in t.shape[1:]}
        sizes = {t.shape[0] for t in used.values()}
        if len(sizes) != 1:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in found.items()) or type(output).__name__
            raise ConfigurationError(
                f"no loss was given, and none can be made of the model's output: {shapes}",
                fix="return a loss as well: return model, batch, loss_fn; loss_fn(model, batch) gives shape (B,)",
            )
        self.words = f"none was given: mean of w y + y^2 / 2 over each example's entries, axis 0, of {', '.join(used)}"
        left_out = [name for name in found if name not in used]
        if left_out:
            self.words += f"; left out: {', '.join(left_out)} (no example axis)"
        return sum((_own_mean(t) for t in used.values()), start=torch.zeros(()))


def _own_mean(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    y = real.reshape(real.shape[0], math.prod(real.shape[1:]))
    w = torch.arange(1, y.shape[1] + 1, device=y.device, dtype=torch.float64).cos().to(y.dtype)
    return (w * y + y.square() / 2).mean(1)


def _call(model: nn.Module, batch: Any) -> Any:
    """Give a batch to a model: a dict as keywords, a tuple or list in order, (tuple, dict) as both, else as one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
            return model(*batch[0], **batch[1])
        return model(*batch)
    return model(batch)


def _named_tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, with its path."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from _named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from _named_tensors(item, f"{name}[{index}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for part in fields(tree):
            yield from _named_tensors(getattr(tree, part.name), f"{name}.{part.name}")


def _check(name: str, made: Any) -> Subject:
    parts = list(made) if isinstance(made, (tuple, list)) else [made]
    kinds = ", ".join(type(part).__name__ for part in parts)
    if len(parts) not in (2, 3) or not isinstance(made, (tuple, list)):
        raise ConfigurationError(f"{name} returned {type(made).__name__} ({kinds})", fix=CONTRACT)
    model, batch = parts[:2]
    loss_fn = parts[2] if len(parts) == 3 else None
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{name} returned ({kinds}): the first is not a torch.nn.Module", fix=CONTRACT)
    if len(parts) == 3 and loss_fn is not None and not callable(loss_fn):
        raise ConfigurationError(f"{name} returned ({kinds}): the third is not a function", fix=CONTRACT)
    if not any(True for _ in _named_tensors(batch, "batch")):
        raise ConfigurationError(f"{name} returned ({kinds}): there is no tensor in the batch", fix=CONTRACT)
    return Subject(model, batch, DefaultLoss() if loss_fn is None else loss_fn)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}", fix="give the path of a Python file, then :factory")
    name = f"_verified_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    _put_on_path(path.resolve().parent)
    sys.modules[name] = module  # dataclasses look their module up
    with users_code(f"importing {path}", "put what should not run now under if __name__ == '__main__':"):
        specification.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    _put_on_path(Path.cwd())
    with users_code(f"importing {name}", "give an importable module, or path/to/file.py:factory"):
        return importlib.import_module(name)


def _put_on_path(folder: Path) -> None:
    """As `python file.py` and `python -m module` do."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
