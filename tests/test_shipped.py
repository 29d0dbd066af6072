"""Recipes that come with the package, by name; the doctor."""

from pathlib import Path

import pytest

from cankd_hf.cli import doctor
from cankd_hf.cli.recipes import main
from cankd_hf.config.reading import read_text
from cankd_hf.config.shipped import find_shipped, shipped_files, shipped_folder
from cankd_hf.errors import InputError
from cankd_hf.host import Host

QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart.yaml"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_a_recipe_goes_by_its_name_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_text(name) == QUICKSTART.read_text()
    assert read_text("comparisons/camvid.yaml", "comparison").startswith("# CamVid")
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("task: segmentation\n")  # a file of the user's own goes first
    assert read_text(name) == "task: segmentation\n"
    for other in ("elsewhere/quickstart.yaml", "./recipes/../quickstart.yaml", "/quickstart"):
        if not find_shipped(other, "recipe").is_file():
            with pytest.raises(InputError, match="expected a file"):
                read_text(other)
    with pytest.raises(InputError, match="did you mean 'dinov2_seg'"):
        read_text("dinov_seg")


def test_the_folder_inside_a_wheel_goes_before_that_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cankd_hf.config.shipped._PACKAGE", tmp_path / "cankd_hf")
    inside = tmp_path / "cankd_hf/shipped/recipes"
    inside.mkdir(parents=True)
    (inside / "x.yaml").write_text("a: 1\n")
    assert shipped_folder("recipe") == inside and read_text("x") == "a: 1\n"


def test_the_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(file.stem in listed for file in shipped_files("recipe")) and "Five minutes from nothing" in listed
    assert main(["show", "quickstart"]) == 0 and capsys.readouterr().out == QUICKSTART.read_text()
    assert main(["--comparisons"]) == 0 and "bccd" in capsys.readouterr().out
    assert main(["quickstart"]) == 0 and capsys.readouterr().out == QUICKSTART.read_text()
    assert main(["show", "nothing"]) == 2 and "`cankd recipes` lists them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["show"])


def test_every_recipe_says_in_its_first_line_what_it_is() -> None:
    for file in [*shipped_files("recipe"), *shipped_files("comparison")]:
        assert file.read_text().startswith("# ") and 20 < len(file.read_text().partition("\n")[0]) < 160, file


def test_the_doctor_names_what_is_missing_and_what_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--offline"]) == 0
    said = capsys.readouterr().out
    assert "python" in said and "memory" in said and "Hub" in said
    idle = {finding.what: finding for finding in doctor.machine(Host(cores=8, asked="OMP_NUM_THREADS=1"))}
    assert "leaves 7 cores idle" in idle["cores"].advice
    busy = {finding.what: finding for finding in doctor.machine(Host(cores=2, others=1.4))}
    assert "1.4 in use by other programs" in busy["cores"].found and busy["cores"].advice
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "1.13", "timm": None}.get(name, "99"))
    found = {finding.what: finding for finding in doctor.packages()}
    assert found["timm"].missing and "pip install" in found["timm"].advice
    assert found["torch"].missing and "pip install -U" in found["torch"].advice
    assert not found["accelerate"].missing
    monkeypatch.setattr(doctor, "packages", lambda: [doctor.Finding("timm", "not installed", "", True)])
    assert doctor.main(["--offline"]) == 1
