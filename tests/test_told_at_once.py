"""What would stop a run is told by the first call, all of it, and by the dry run too."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from cankd_hf import train
from cankd_hf.config.schema import Problems
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.run import run
from cankd_hf.runs.session import check_machine

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}


def recipe(folder: Path, **changes: object) -> str:
    """A recipe on generated images, written to a file."""
    settings = {
        "output_dir": str(folder / "run"),
        "data": {"path": "shapes", "generated": {"train": 4, "validation": 2, "test": 2, "size": 32}},
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "training": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**settings, **changes}))
    return str(file)


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a call that is refused, which a dry run says too."""
    said = []
    for more in ([], ["--dry-run"]):
        assert train.main([*words, *more]) == 2
        said.append(capsys.readouterr().err.splitlines())
    assert said[0] == said[1]
    return [re.split(r"[: ]", line.removeprefix("error: "))[0] for line in said[0]]


def test_places_and_settings_that_need_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    file = recipe(
        tmp_path,
        data={"path": str(tmp_path / "gone"), "eval_split": None},
        student={"model": str(tmp_path / "empty")},
        teacher={"model": "/no/such/teacher"},
        training={"eval_strategy": "epoch", "load_best_model_at_end": True, "dataloader_prefetch_factor": 2},
    )
    assert told([file], capsys) == [
        "training.load_best_model_at_end",
        "training.dataloader_prefetch_factor",
        "training.eval_strategy",
        "data.path",
        "student.model",
        "teacher",
    ]
    assert not (tmp_path / "run").exists()


def test_folder_trackers_scores_and_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cankd_hf.hub.upload.get_token", lambda: None)
    (tmp_path / "run").write_text("a file")
    training = {"report_to": ["clearml", "tensorbord"], "metric_for_best_model": "eval_accuracy", "tf32": True}
    file = recipe(tmp_path, training=training, hub={"id": "me/student"})
    said = told([file, "student.fpn.head=x"], capsys)
    # `tf32` is refused by transformers itself, and with it nothing after it can be checked.
    assert said == [
        "student.fpn",
        "output_dir",
        "training.report_to",
        "training.report_to",
        "training.metric_for_best_model",
        "training",
    ]
    assert told([file, "training.tf32=null", "training.report_to=none"], capsys) == [
        "output_dir",
        "training.metric_for_best_model",
        "me/student",
    ]


def test_nothing_is_left_by_the_checks_and_python_gets_them_too(tmp_path: Path) -> None:
    file = recipe(tmp_path, output_dir=str(tmp_path / "a" / "b"))
    assert train.main([file, "training.report_to=tensorbord", "--dry-run"]) == 2
    assert os.listdir(tmp_path) == ["recipe.yaml"]
    unknown = parse_recipe(Path(file).read_text(), ["training.metric_for_best_model=iuo_a", "data.path=/gone"])
    with pytest.raises(
        ValueError, match=r"data\.path: .*nothing is there\ntraining\.metric_for_best_model: "
    ) as caught:
        run(unknown)
    assert "iou_" in str(caught.value)


def test_a_dry_run_refuses_the_folder_of_another_recipe_unless_it_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path)
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 1\n")
    assert told([file], capsys) == ["output_dir"]
    assert train.main([file, "--dry-run", "--restart"]) == 0


def test_splits_and_labels_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("train/0.png", "train/masks/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (64, 64)).save(tmp_path / name)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "0.png", "mask_file_name": "masks/0.png"}\n')
    file = recipe(tmp_path, data={"path": str(tmp_path), "test_split": "tset", "crop_size": [32, 32]})
    assert told([file], capsys) == ["data.labels", "data.eval_split", "data.test_split"]


def test_sets_of_unlabelled_images_are_looked_for_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path)
    phases = 'phases=[{name: a, share: 0.5, data: {unlabelled: "/no/b"}}, {name: b, share: 0.5}]'
    assert train.main([file, "data.unlabelled=/no/a", phases, "--dry-run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("nothing is there")]
    assert [line.split()[1] for line in lines] == [
        "data.unlabelled",
        "phases.0.data.unlabelled",
    ] and "`rows`" in lines[0]
    for name in ("rows", "shapes", "me/pictures", str(tmp_path)):
        parse_recipe(Path(file).read_text(), [f"data.unlabelled={name}"], to_run=True)


def test_of_several_processes_one_tries_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one removes what another is about to write into."""
    tried: list[Path] = []
    monkeypatch.setattr("cankd_hf.runs.session.check_folder", tried.append)
    made = parse_recipe(Path(recipe(tmp_path)).read_text())
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_machine(made, Problems())
    assert tried == [tmp_path / "run"]
