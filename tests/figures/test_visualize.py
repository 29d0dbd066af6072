"""`cankd_hf.visualize` on what a run leaves behind, and on what is left of it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cankd_hf import train, visualize
from cankd_hf.config.data import DataConfig
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import InputRule
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import DetectionTask
from cankd_hf.visualize.checkpoint import open_checkpoint
from cankd_hf.visualize.images import Picture, padded, pictures_of_recipe
from tests.instances.folders import write_instances

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET |= {"layer_type": "basic", "out_indices": [1, 2]}  # two levels: half the panels to draw
INSTANCES = str(Path(__file__).resolve().parents[2] / "recipes" / "instance_quickstart.yaml")
KINDS = ["attention", "difference", "heat", "pca"]


def run(folder: Path, **changes: Any) -> Path:
    """A finished run of four steps."""
    settings = {
        "output_dir": str(folder / "run"),
        "data": {
            "path": "shapes",
            "generated": {"train": 8, "validation": 2, "test": 3, "size": 64},
            "image_size": [64, 64],
            "test_split": "test",
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {
            "config": {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16},
            "fit": {"max_steps": 1},
        },
        "distill": {
            "terms": [
                {"name": "dot", "pairs": [[0, 0], [1, 1]]},
                {"name": "soft", "pairs": [[1, 1]], "options": {"affinity": "embedded_gaussian"}},
            ]
        },
        "baseline": True,
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**settings, **changes}))
    assert train.main([str(file)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("visualize"))


class Page(HTMLParser):
    """What a browser would ask for, show and read aloud."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.sources += [given[key] or "" for key in ("src", "href", "data", "action") if key in given]
        if tag == "img":
            self.alts.append(given.get("alt") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def kinds(folder: Path) -> list[str]:
    return sorted({file.stem.rpartition("_")[2] for file in folder.glob("*.png")})


def test_a_run_gives_all_figures_and_one_page_that_needs_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visualize.main([str(finished), "--count", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "image 1 of 1" in shown and f"Look at {tmp_path / 'report.html'}" in shown
    assert kinds(tmp_path) == sorted([*KINDS, "curves"])
    page = Page(tmp_path / "report.html")
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags
    pictures = [source for source in page.sources if source.startswith("data:")]
    assert len(pictures) == 4 + 1 == len(set(page.alts)) and all(page.alts)
    curves = base64.b64decode(pictures[-1].partition(",")[2])
    assert curves == (tmp_path / "curves.png").read_bytes()
    for words in ("student alone", "student distilled", "Mean IoU", "max_steps: 4", "seed 42", "dot", "soft"):
        assert words in page.text, words
    assert page.tags.count("h1") == 1 and page.tags.count("main") == 1


def test_whoever_reads_the_folder_of_a_run_reads_its_weights(finished: Path) -> None:
    weights = [*finished.rglob("*.safetensors")]
    assert {file.name for file in weights} == {"model.safetensors", "distiller.safetensors"}
    assert all(file.stat().st_mode & 0o666 == file.parent.stat().st_mode & 0o666 != 0o600 for file in weights)


def test_losses_without_weights_show_the_teacher_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, distill={"terms": [{"loss": "kl"}]}, baseline=False)
    assert not [*folder.rglob("distiller.safetensors")]
    opened = open_checkpoint(str(folder))
    assert opened.notes == [] and list(opened.teachers) == ["teacher"]
    assert [subject.name for subject in opened.subjects] == ["student before", "student after"]
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-2/teacher_manifest.json").unlink()
    assert list(open_checkpoint(str(folder)).teachers) == ["teacher"]  # nothing else is needed of a checkpoint


def test_before_and_after_are_the_weights_of_the_run(finished: Path) -> None:
    """Before: what the run began with, connectors too, so that its first loss comes out again."""
    opened = open_checkpoint(str(finished))
    assert [subject.name for subject in opened.subjects] == ["student before", "student alone", "student after"]
    assert opened.notes == [] and list(opened.teachers) == ["teacher"]
    saved = load_file(finished / "checkpoint-4" / "distiller.safetensors")
    after = opened.subjects[-1].distiller
    assert after is not None
    own = after.state_dict()
    assert saved and all((own[name] == value).all() for name, value in saved.items())
    weights = load_file(finished / "model.safetensors")
    assert all((own[f"student.{name}"] == value).all() for name, value in weights.items())
    # Trained with a learning rate of 0 the student stays what `before` says it was.
    still = run_still(finished.parent / "still")
    before = opened.subjects[0].distiller
    assert before is not None
    for name, value in load_file(still / "checkpoint-4" / "distiller.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            assert (before.state_dict()[name] == value).all(), name
    for name, value in load_file(still / "model.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            assert (before.state_dict()[f"student.{name}"] == value).all(), name


def test_connectors_are_those_of_the_students_step(finished: Path, tmp_path: Path) -> None:
    """As where the best model was loaded at the end; a checkpoint that is gone is said."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    facts = json.loads((folder / "distillation.json").read_text())
    for step, taken, said in ((2, 2, False), (3, 4, True)):
        (folder / "distillation.json").write_text(json.dumps({**facts, "step": step}))
        opened = open_checkpoint(str(folder))
        distiller = opened.subjects[-1].distiller
        assert distiller is not None
        saved = load_file(folder / f"checkpoint-{taken}" / "distiller.safetensors")
        assert all((distiller.state_dict()[name] == value).all() for name, value in saved.items())
        assert any("is of step 3 (the best), its connectors and losses of step 4" in n for n in opened.notes) is said


def run_still(folder: Path) -> Path:
    folder.mkdir()
    settings = {"max_steps": 4, "save_steps": 4, "learning_rate": 0.0, "weight_decay": 0.0}
    common = {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return run(folder, baseline=False, training={**settings, **common})


def test_a_checkpoint_and_files_one_of_them_broken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "a <b> & c.tif", tmp_path / "bad.jpg"
    Image.effect_noise((90, 70), 80).save(good)  # grey, and not of the student's size
    bad.write_bytes(b"\xff\xd8 no jpeg")
    out = tmp_path / "out"
    images = ["--images", str(good), str(bad)]
    checkpoint = str(finished / "checkpoint-2")
    assert visualize.main([checkpoint, *images, "--pixel", "60,80", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("left out:") == 1 and "bad.jpg" in shown
    assert kinds(out) == sorted([*KINDS, "curves"])
    html = (out / "report.html").read_text()
    assert "a &lt;b&gt; &amp; c.tif" in html and "<b> & c" not in html


def test_what_is_missing_is_left_out_and_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [f"teacher={{model: {tmp_path / 'gone'}}}", "--count", "1", "--output", str(tmp_path / "a")]
    assert visualize.main([str(finished), *absent]) == 0
    shown = capsys.readouterr().out
    assert shown.count("note: The teacher could not be loaded") == 1 and "teacher.model" in shown
    assert kinds(tmp_path / "a") == ["curves", "heat", "pca"]
    assert "The teacher could not be loaded" in Page(tmp_path / "a" / "report.html").text

    pushed = tmp_path / "pushed"
    pushed.mkdir()
    names = ("config.json", "model.safetensors", "preprocessor_config.json", "distillation.json")
    for file in [*(finished / name for name in names), *finished.glob("*.py")]:
        shutil.copy(file, pushed)
    assert visualize.main([str(pushed), "--output", str(tmp_path / "b")]) == 2
    assert "--images: expected image files" in capsys.readouterr().err
    image = tmp_path / "image.png"
    Image.effect_noise((64, 64), 80).save(image)
    assert visualize.main([str(pushed), "--images", str(image), "--output", str(tmp_path / "b")]) == 0
    assert kinds(tmp_path / "b") == ["heat", "pca"]
    shutil.copy(finished / "recipe.yaml", pushed)
    capsys.readouterr()
    assert visualize.main([str(pushed), "--images", str(image)]) == 0
    assert "note: There is no distiller.safetensors" in capsys.readouterr().out
    assert kinds(pushed / "visualize") == ["heat", "pca"]


def test_another_teacher_is_noticed(finished: Path) -> None:
    config = yaml.safe_load((finished / "recipe.yaml").read_text())["teacher"]["config"]
    notes = open_checkpoint(str(finished), [f"teacher={json.dumps({'config': config})}"]).notes
    assert any("(random weights) is not the one of the training" in note for note in notes)
    with pytest.raises(InputError, match=r"expected the connectors and losses of the recipe.*leave out changes"):
        open_checkpoint(str(finished), ["distill.terms.0.pairs=[[1, 1]]"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pixel", "0,64"], "--pixel: expected a row below 64 and a column below 64"),
        (["--images", "no_such_file.png"], "no_such_file.png: the file does not exist"),
        (["--count", "0"], "--count: expected at least 1"),
        (["student.fpn.fpn_channls=3"], "fpn_channls"),
        (["data.path=/no/such/set"], "give --images"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visualize.main([str(finished), *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"distill": {"weights": "recommended"}}, {"schedule": "features_then_task"}])
def test_guarded_runs_and_runs_in_phases_are_shown(changes: dict[str, Any], tmp_path: Path) -> None:
    distill = {"terms": [{"loss": "instance_mse", "pairs": [[1, 1]]}], **changes.get("distill", {})}
    folder = run(tmp_path, **{**changes, "distill": distill, "baseline": False})
    assert visualize.main([str(folder), "--count", "1"]) == 0
    assert (folder / "visualize" / "report.html").is_file()


def test_without_a_test_split_the_validation_split_is_shown(tmp_path: Path) -> None:
    """As it is scored: a recipe's `test_split` counts where the set has one."""
    words = [f"data.path={write_instances(tmp_path / 'set')}", "data.image_size=[32, 48]"]
    found = pictures_of_recipe(load_recipe(INSTANCES, words), 2)
    assert [picture.name for picture in found] == ["val/0.png", "val/1.png"]
    words = ["data.path=shapes", "data.generated={train: 2, validation: 2, test: 1, size: 64}"]
    assert len(pictures_of_recipe(load_recipe(INSTANCES, words), 2)) == 1


def test_no_student_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualize.main([str(tmp_path)]) == 2
    assert "expected a saved student" in capsys.readouterr().err
    assert visualize.main(["nobody/nothing"]) == 2
    assert re.search(r"error: nobody/nothing: expected a folder or a Hub id", capsys.readouterr().err)


def test_a_label_free_student(tmp_path: Path) -> None:
    """The features task: a backbone beside a plain ViT teacher of one stride."""
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    data = {"path": "shapes", "generated": {"train": 8, "validation": 2, "size": 64}, "image_size": [64, 64]}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    folder = run(
        tmp_path,
        task="features",
        data=data,
        student={"backbone": {**RESNET, "out_indices": [3, 4]}},
        teacher={"config": {"model_type": "dinov2", "mlp_ratio": 2, **vit}},
        distill={"task_weight": 0.0, "terms": [{"options": {"affinity": "gaussian"}}]},
        baseline=False,
        training=training,
    )
    out = tmp_path / "out"
    assert visualize.main([str(folder), "--count", "1", "--output", str(out)]) == 0
    assert set(kinds(out)) >= set(KINDS)


@pytest.mark.slow
def test_several_teachers_are_opened_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16}
    teachers = {"fitted": {"config": config, "fit": {"max_steps": 1}}, "random": {"config": RESNET}}
    terms = [
        {"name": "dot", "teacher": "fitted", "pairs": [[1, 1]]},
        {"name": "plain", "loss": "instance_mse", "teacher": "random", "pairs": [[1, 0]]},
    ]
    folder = run(tmp_path, teacher=None, teachers=teachers, distill={"terms": terms}, baseline=False)
    opened = open_checkpoint(str(folder))
    assert list(opened.teachers) == ["fitted", "random"]
    assert opened.notes == [], "random weights are drawn from the seed, and the fitted teacher is that of the run"
    reseeded = open_checkpoint(str(folder), ["seed=7"])
    assert len(reseeded.notes) == 1 and "teacher random here (random weights) is not" in reseeded.notes[0]
    assert list(opened.histories) == ["student distilled", "teacher fitted"]
    distiller = opened.subjects[-1].distiller
    assert distiller is not None and list(distiller.pairs) == ["fitted_s1t1", "random_s1t0"]
    assert visualize.main([str(folder), "--count", "1", "--output", str(tmp_path / "a")]) == 0
    assert kinds(tmp_path / "a") == sorted([*KINDS, "curves"])
    text = Page(tmp_path / "a" / "report.html").text
    assert "Teacher fitted" in text and "Teacher random" in text
    absent = f"teachers.random={{model: {tmp_path / 'gone'}}}"
    capsys.readouterr()
    assert visualize.main([str(folder), absent, "--count", "1", "--output", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "note: The teacher random could not be loaded" in shown and "teachers.random.model=" in shown
    assert kinds(tmp_path / "b") == ["curves", "heat", "pca"]


def test_models_that_want_multiples_get_padded_images() -> None:
    data = DataConfig(path="x", image_size=[60, 90])
    image = torch.zeros(3, 60, 90)
    picture = Picture("x", image, (120, 180), np.zeros((60, 90, 3)))
    task = DetectionTask({0: "cell"})
    assert padded(picture, task, data) is picture
    task.rule = InputRule(multiple=32, strict=True)
    found = padded(picture, task, data)
    assert found.pixel_values.shape == (3, 64, 96) and found.image.shape == (64, 96, 3)
    assert found.size == (128, 192)  # so that row 119 of the file is still where it was


@pytest.mark.slow
def test_a_detector_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    """Blood cells; the teacher has random weights, only the paths through the code are looked at."""
    four = {**RESNET, "out_indices": [1, 2, 3, 4]}
    fcos = {"head": "fcos", "fpn_channels": 32, "head_channels": 32, "head_layers": 1}
    folder = run(
        tmp_path,
        task="detection",
        data={
            "path": str(shared_data / "bccd"),
            "image_size": [96, 128],
            "crop_size": [96, 128],
            "max_train_samples": 8,
            "max_eval_samples": 4,
            "test_split": "test",
        },
        student={"backbone": four, "fpn": fcos},
        teacher={"config": {"model_type": "cankd_fpn", "backbone_config": four, **fcos}, "fit": {"max_steps": 1}},
        distill={"terms": [{}]},
    )
    out = tmp_path / "out"
    image = next((shared_data / "bccd" / "test").rglob("*.jpg"))
    assert visualize.main([str(folder), "--images", str(image), "--output", str(out)]) == 0
    assert kinds(out) == sorted([*KINDS, "curves"])
