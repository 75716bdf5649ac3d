"""Public architectures, unmodified: exact to 1e-8, or refused by the name that the registry says is right."""

from __future__ import annotations

import pytest
from findings import FINDINGS, finding
from registry import MODULES, load
from table import PAGE, rows_of

from zoo import ENTRIES, Entry, measure

_, MISSING = load()
QUICK = [e for e in ENTRIES if e.quick or finding(e)]


def _case(chosen: Entry):
    reason = finding(chosen)
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    return pytest.param(chosen, id=f"{chosen.library} {chosen.name}", marks=marks)


@pytest.mark.parametrize("library", MODULES)
def test_library_is_installed(library):
    if library in MISSING:
        pytest.skip(f"the zoo's models of {library} are not run: {MISSING[library]}")


@pytest.mark.parametrize("chosen", [_case(e) for e in QUICK])
@pytest.mark.filterwarnings("ignore")
def test_model(chosen: Entry):
    found = measure(chosen)
    if chosen.refused is not None:
        assert found.is_refused_as(chosen), found.failure
        return
    if found.failure is not None:
        raise found.failure
    assert set(found.errors) == {"per-example gradients", "clipped sum, auto", "clipped sum, ghost"}
    assert found.error <= chosen.bound, found.errors
    assert found.uses and found.unreached < found.tensors


def test_names_are_one_row_each():
    names = [(e.library, e.name) for e in ENTRIES]
    assert len(set(names)) == len(names)


def test_findings_name_models():
    if MISSING:
        pytest.skip(f"some findings name models of libraries that are not installed: {sorted(MISSING)}")
    known = {f"{e.library} {e.name}" for e in ENTRIES}
    assert {name for names in FINDINGS.values() for name in names} <= known


def test_page_has_every_model():
    if MISSING:
        pytest.skip(f"the page has models of libraries that are not installed: {sorted(MISSING)}")
    assert rows_of(PAGE.read_text()) == [(e.library, e.name) for e in load()[0]]


@pytest.mark.parametrize("adapter", ["FourierFT on ViT", "Prompt tuning on Llama"])
def test_what_has_to_be_declared_is_refused_until_it_is(adapter, monkeypatch):
    """Nothing tells a tensor that was made with the model from conditioning that was put there for this batch."""
    peft_models = pytest.importorskip("peft_models")
    monkeypatch.setattr(peft_models, "declare_constants", lambda model: None)
    chosen = next(e for e in ENTRIES if (e.library, e.name) == ("peft", adapter))
    found = measure(chosen)
    assert found.refusal == "ExampleAxisError"
    assert "['default']" in found.failure.fix and "dither.constant(tensor)" in found.failure.fix
