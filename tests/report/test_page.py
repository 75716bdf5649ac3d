"""What the page says of runs that are whole, cut, seeded, or fit to publish."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from PIL import Image

from dither.errors import OutputPathError, RunFolderError
from dither.report import write_report
from dither.report.contents import read_contents
from pages import words


def change(run, **values) -> None:
    certificate = json.loads((run / "certificate.json").read_text()) | values
    (run / "certificate.json").write_text(json.dumps(certificate))


def test_the_claim(run):
    said = words(run / "report.html")
    certificate = json.loads((run / "certificate.json").read_text())
    assert f"epsilon {certificate['epsilon']:.3f}" in said
    assert "Every one of the 1,437 examples" in said and "add or remove one example" in said
    assert "Detection of one example, at most" in said
    assert "Loss, steps 1 to 8" in said
    assert "Not private." not in said and "Unfinished" not in said


def test_a_public_copy_holds_nothing_that_is_not_private(copy):
    (copy / "evaluation").mkdir()
    Image.new("RGB", (8, 8)).save(copy / "evaluation" / "nearest.png")
    figures = {"knn": {"value": 0.12345, "private": False}, "noisy": {"value": 0.54321, "private": True}, "fid": 77.125}
    figures["mixed"] = {"private": True, "inner": {"value": 0.6789, "private": False}}
    (copy / "evaluation.json").write_text(json.dumps(figures))
    whole = words(write_report(copy))
    assert "0.1235" in whole and "0.5432" in whole and "77.12" in whole and "Images a second" in whole
    assert write_report(copy).read_text().count("<img") == 4
    public = write_report(copy, public=True)
    assert public.name == "report-public.html"
    said = words(public)
    assert "0.5432" in said and "0.1235" not in said and "77.12" not in said and "0.6789" not in said
    for hidden in ("Loss, steps", "Share of gradients clipped", "Images a second", "Time in steps"):
        assert hidden in whole and hidden not in said
    assert public.read_text().count("<img") == 3 and "href=" not in public.read_text().partition("<main")[2]


def test_of_the_verification_nothing_counts_as_covered(copy):
    """Its result is computed from the first batch without noise, and state/ has the differences themselves."""
    whole, public = (words(write_report(copy, public=public)) for public in (False, True))
    assert "Gradients compared with autograd exact not private" in whole and "compared with autograd" not in public
    for said in (whole, public):
        assert "state/ what a resume needs, figures of the verification among it not private" in said
    change(copy, verification={"status": "turned off", "exact": None})
    assert "Gradients compared with autograd turned off To check" in words(write_report(copy))
    change(copy, verification={"status": "not exact", "exact": False})
    assert "danger Gradients were not exact" in words(write_report(copy, public=True))


def test_a_public_copy_does_not_say_in_which_folders_things_lie(copy):
    paths = {"data": {"path": "ward 7/scans"}, "finetune.from": "/home/eve/b", "x": ["~/a/dit.pt", r"C:\Mia\x.npz"]}
    kept = {"pretrain": {"path": "hf:owner/images"}, "class": "torch.optim.Adam", "model": "DiT-S/2"}
    (copy / "config.yaml").write_text(json.dumps(paths | kept))
    checkpoint = {"path": "/home/ann/dit.pt", "sha256": {"dit.pt": "0" * 64}, "taken_as_public": "on the word of A"}
    tuning = {"mode": "lora", "trained_numbers": 5000, "all_numbers": 90000, "parameters": ["a"]}
    change(copy, public={"checkpoint": checkpoint, "fine_tuning": tuning})
    whole, public = (words(write_report(copy, public=public)) for public in (False, True))
    for folder in ("/home/eve", "/home/ann", "~/a", "Mia", "ward 7"):
        assert folder in whole and folder not in public
    for name in (".../scans", ".../b", ".../dit.pt", ".../x.npz", "hf:owner/images", "torch.optim.Adam", "DiT-S/2"):
        assert name in public


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Model DiT-digits"),
        ({"model": "diffusers_unet"}, "Model UNet2DModel"),
        ({"model": {"class_path": "mine.Net", "init_args": {"width": 4}}}, "Model mine.Net"),
        ({"finetune": {"from": "dit.pt", "mode": "full"}}, "Model DiT, of the checkpoint"),
    ],
)
def test_the_model_that_was_trained_is_named(copy, options, said):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | options))
    assert said in words(write_report(copy, public=True))


def test_cut_before_anything_was_written(copy):
    for name in ("certificate.json", "config.yaml", "samples.png", "report.html"):
        (copy / name).unlink()
    for name in ("samples", "tensorboard", "state"):
        shutil.rmtree(copy / name)
    said = words(write_report(copy))
    for expected in ("No certificate", "nothing is claimed", "No curves were logged", "No samples were drawn yet"):
        assert expected in said


def test_unfinished_resumed_and_gone_on(copy):
    change(copy, steps_done=5, resumed=2, epsilon=2.0)
    said = words(write_report(copy))
    assert "5 of 8 steps are done" in said and "resumed 2 times" in said
    assert "The log reaches step 8, the certificate covers 5" in said


def test_before_the_first_step(copy):
    change(copy, steps_done=0, ledger=[], epsilon=0.0)
    assert "Nothing was released yet" in words(write_report(copy))


def test_what_was_taken_as_public(copy):
    data = {"path": "hf:photos", "sha256": None, "taken_as_public": "on the word of A", "examples": 1000}
    tuning = {"mode": "lora", "trained_numbers": 5000, "all_numbers": 90000, "parameters": ["a"]}
    checkpoint = {"path": "/dit.pt", "sha256": {"dit.pt": "0" * 64}, "taken_as_public": "on the word of A"}
    data |= {"labels": False, "steps": 7}
    change(copy, public={"pretraining": data, "fine_tuning": tuning, "checkpoint": checkpoint})
    said = words(write_report(copy))
    for expected in (
        "caution Taken as public. The checkpoint /dit.pt is taken as public, on the word of A",
        "hf:photos: 1,000 examples",
        f"/dit.pt (dit.pt: SHA-256 {'0' * 64})",
        "lora: 5,000 of 90,000 numbers",
    ):
        assert expected in said


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"private": False, "reasons": ["seed=7: known"]}, "seed=7: known. No guarantee holds"),
        ({"verification": {"status": "turned off", "exact": None}}, "Unverified model"),
        ({"verification": {"status": "not exact", "exact": False}}, "Gradients were not exact"),
        ({"delta": 0.01}, "Delta is large"),
        ({"epsilon": 12.0}, "A weak bound"),
    ],
)
def test_warnings(copy, values, expected):
    assert expected not in words(copy / "report.html")
    change(copy, **values)
    assert expected in words(write_report(copy))


def test_what_is_no_run(tmp_path, copy):
    with pytest.raises(RunFolderError, match=r"run\.json"):
        write_report(tmp_path)
    with pytest.raises(OutputPathError):
        write_report(copy, tmp_path)
    (copy / "certificate.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"certificate\.json is damaged"):
        read_contents(copy)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"epsilon": None}, "epsilon"),
        ({"epsilon": float("nan")}, "NaN"),
        ({"ledger": "x"}, "ledger"),
        ({"verification": []}, "verification"),
        ({"delta": 0}, "delta"),
    ],
)
def test_a_certificate_of_another_form_is_damaged(copy, values, fault):
    change(copy, **values)
    for public in (False, True):
        with pytest.raises(RunFolderError, match=rf"certificate\.json is damaged: .*{fault}"):
            write_report(copy, public=public)


def test_an_option_of_another_form_is_damaged(copy):
    (copy / "config.yaml").write_text("recipe: 3\n")
    with pytest.raises(RunFolderError, match=r"config\.yaml is damaged"):
        write_report(copy)


def test_a_folder_is_no_picture(copy):
    (copy / "samples" / "step-00009.png").mkdir()
    (copy / "evaluation" / "x.png").mkdir(parents=True)
    assert write_report(copy).read_text().count("<img") == 3


def test_a_claim_that_its_ledger_denies_is_not_repeated(copy):
    change(copy, epsilon=1.0)
    said = words(write_report(copy))
    assert "danger The claim does not hold. epsilon is stated as 1; the ledger spends" in said
    assert "nothing is claimed" in said and "epsilon, void 1.00" in said
    assert "but for a chance of about" not in said and "Detection of one example" not in said


def test_links_lead_to_the_run_from_elsewhere(copy, tmp_path):
    (tmp_path / "pages").mkdir()
    page = write_report(copy, tmp_path / "pages" / "a.html")
    assert 'href="../hospital%20scans/certificate.json"' in page.read_text()
