"""`dither bench`: a real run at tiny sizes, its files, its exit codes, and requests that cannot work."""

from __future__ import annotations

import json

import pytest

from dither.cli.main import main

QUICK = ["--smoke", "--microbatches=2", "--pairs=2", "--warm_up=1", "--threads=1", "--memory=false"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results.json"
    words = ["--models", "gpt2", "--contenders", "auto", "opacus_ghost", "--sweep", "batch", "--explain"]
    assert main(["bench", *words, *QUICK, f"--save={path}"]) == 0
    return path


def test_what_was_measured(saved):
    read = json.loads(saved.read_text())
    assert [row["model"] for row in read["rows"]] == ["gpt2"]
    assert read["about"]["settings"] == {"microbatches": 2, "pairs": 2, "warm_up": 1}
    cells = read["rows"][0]["cells"]
    assert list(cells) == ["plain", "auto", "opacus_ghost"]
    assert [len(cells[name]["seconds"]) for name in ("plain", "auto")] == [2, 2]
    assert [cell["error"] is None for cell in cells.values()] == [True, True, False]
    assert [part["axis"] for part in read["growth"]] == ["batch"]
    assert set(read["explained"]) == {"gpt2"}
    assert read["failed"] == []


def test_page_and_picture_of_saved_results(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "docs" / "performance.md", tmp_path / "docs" / "images" / "performance.png"
    assert main(["bench", f"--load={saved}", f"--page={page}", f"--picture={picture}"]) == 0
    assert "Step time over the plain step" in capsys.readouterr().out
    assert "](images/performance.png)" in page.read_text()
    assert "NotImplementedError: Parameter tying is not supported" in page.read_text()
    assert picture.stat().st_size > 10_000


def test_check(saved, tmp_path, capsys):
    assert main(["bench", f"--load={saved}", f"--check={saved}"]) == 0
    doctored = json.loads(saved.read_text())
    doctored["rows"][0]["cells"]["auto"]["seconds"] = [t / 2 for t in doctored["rows"][0]["cells"]["auto"]["seconds"]]
    (tmp_path / "doctored.json").write_text(json.dumps(doctored))
    capsys.readouterr()
    assert main(["bench", f"--load={saved}", f"--check={tmp_path / 'doctored.json'}"]) == 1
    assert "regressed: dither auto on gpt2" in capsys.readouterr().err


def test_config_file(tmp_path, capsys):
    file = tmp_path / "bench.yaml"
    lines = ("models: []", "sweep: [depth]", "smoke: true", "pairs: 1", "microbatches: 1", f"save: {tmp_path}/r.json")
    file.write_text("\n".join(lines))
    assert main(["bench", f"--config={file}"]) == 0
    assert "exponent" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--models", "resnet"], "resnet"),
        (["--contenders", "opacus"], "opacus"),
        (["--sweep", "heads"], "heads"),
        (["--pairs=0"], "pairs"),
        (["--microbatches=-1"], "microbatches"),
        (["--threads=0"], "threads"),
        (["--pairs=many"], "many"),
        (["--picture=picture.txt"], "picture.txt"),
        (["--check=missing.json"], "missing.json"),
        (["--load=missing.json"], "missing.json"),
        (["--save=/proc/nowhere/r.json"], "/proc/nowhere"),
        (["--jax_python=/no/python"], "/no/python"),
        (["--wide"], "wide"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option_is_named(words, named, failure):
    assert named in failure("bench", *QUICK, *words)
