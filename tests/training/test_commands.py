"""The commands as a user calls them: exit codes, messages, and folders that load anywhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from cankd_hf import evaluate, train
from tests.processes import Forked, environment, forked

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"


def recipe(folder: Path, **changes: object) -> str:
    """A recipe of three steps on generated images, written to a file."""
    settings = {
        "task": "segmentation",
        "output_dir": str(folder / "run"),
        "data": {
            "path": "shapes",
            "generated": {"train": 16, "validation": 4, "test": 4, "size": 64},
            "crop_size": [64, 64],
            "test_split": "test",
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {
            "config": {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16},
            "fit": {"max_steps": 2},
        },
        "baseline": True,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    settings.update(changes)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_help_answers_at_once_and_without_torch() -> None:
    for module in ("train", "evaluate", "compare"):
        start = time.perf_counter()
        code = f"import sys, cankd_hf.{module} as m; m.parser().format_help(); assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert time.perf_counter() - start < 2


def test_a_run_ends_in_a_table_a_picture_and_students_that_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = recipe(tmp_path)
    assert train.main([file]) == 0
    shown = capsys.readouterr().out
    for words in ("teacher", "student alone", "student distilled", "miou", "Load the student with", "predictions.png"):
        assert words in shown, shown
    run = tmp_path / "run"
    last = shown.splitlines()[-1]
    assert re.fullmatch(
        rf"Reached mIoU 0\.\d{{3}} \(test\) after 3 steps in [\d.]+ s; student: {run}; "
        r"card, results and recipe beside it\.",
        last,
    ), last
    results = json.loads((run / "results.json").read_text())
    assert [arm["steps"] for arm in results["arms"]] == [2, 3, 3]
    assert (run / "predictions.png").stat().st_size > 10_000
    assert all(name.startswith(("backbone.", "neck.", "head.")) for name in load_file(run / "model.safetensors"))
    assert {"recipe.yaml", "preprocessor_config.json", "config.json"} <= {path.name for path in run.iterdir()}
    # The second call finds everything done, and scores are the same from the saved folder.
    assert train.main([file]) == 0
    assert caplog.text.count("finished before") == 3 and "is not used" not in caplog.text
    assert train.main([file, "--resume", str(run / "checkpoint-3")]) == 0
    assert f"--resume {run / 'checkpoint-3'} is not used" in caplog.text
    assert evaluate.main([str(run), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["miou"] == pytest.approx(results["arms"][-1]["scores"]["miou"], abs=1e-6)


@pytest.mark.slow
def test_both_students_start_from_the_same_weights(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    assert train.main([file, "training.learning_rate=0.0", "training.weight_decay=0.0"]) == 0
    alone, distilled = (
        load_file(tmp_path / "run" / name) for name in ("alone/model.safetensors", "model.safetensors")
    )
    for name, value in alone.items():
        if "running_" not in name and "num_batches" not in name:
            assert (value == distilled[name]).all(), name


def test_inherited_parts_are_copied_said_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    student = {"backbone": RESNET, "fpn": {"fpn_channels": 16, "head_channels": 16}, "inherit": ["neck", "head"]}
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    settings = {**yaml.safe_load(Path(recipe(tmp_path)).read_text())["training"], **still}
    file = recipe(tmp_path, student=student, training=settings, baseline=False)
    assert train.main([file]) == 0
    shown = capsys.readouterr().out
    assert "distilled †" in " ".join(shown.split()) and "starts with the teacher's weights in: head, neck" in shown
    assert "neck: 16 of 16 tensors copied" in caplog.text
    teacher, own = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("teacher", "."))
    for name, value in own.items():
        if name.startswith(("neck.", "head.")) and "running_" not in name and "num_batches" not in name:
            assert (value == teacher[name]).all(), name
    assert "† starts with parts of the teacher" in (tmp_path / "run" / "README.md").read_text()
    arm = json.loads((tmp_path / "run" / "arm.json").read_text())
    assert arm["inherited"] == ["neck", "head"]


@pytest.mark.slow
def test_a_native_student_loads_with_stock_transformers(tmp_path: Path) -> None:
    segformer = {"model_type": "segformer", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    segformer |= {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
    file = recipe(tmp_path, student={"config": segformer}, teacher={"config": {**_dinov2()}}, baseline=False)
    assert train.main([file]) == 0
    code = (
        "import sys; sys.modules['cankd_hf'] = None\n"
        "from transformers import AutoModelForSemanticSegmentation, pipeline\n"
        f"model = AutoModelForSemanticSegmentation.from_pretrained({str(tmp_path / 'run')!r})\n"
        "assert type(model).__name__ == 'SegformerForSemanticSegmentation'\n"
        "from PIL import Image\n"
        f"found = pipeline('image-segmentation', {str(tmp_path / 'run')!r})(Image.new('RGB', (80, 60)))\n"
        "assert found[0]['mask'].size == (80, 60)\n"
    )
    done = forked(["-c", code])
    assert done.returncode == 0, done.stderr


def test_label_free_distils_a_backbone_that_transformers_loads(tmp_path: Path) -> None:
    file = recipe(
        tmp_path,
        task="features",
        baseline=False,
        student={"backbone": {**RESNET, "out_indices": [3, 4]}},
        teacher={"config": _dinov2()},
        distill={"task_weight": 0, "terms": [{"loss": "cankd"}]},
    )
    assert train.main([file]) == 0
    run = tmp_path / "run"
    scores = json.loads((run / "results.json").read_text())["arms"][0]["scores"]
    assert -1 <= scores["correlation"] <= 1 and 0 <= scores["cka"] <= 1
    code = (
        "import sys; sys.modules['cankd_hf'] = None\n"
        "import torch; from transformers import ResNetBackbone\n"
        f"maps = ResNetBackbone.from_pretrained({str(run)!r})(torch.zeros(1, 3, 64, 64)).feature_maps\n"
        "assert [m.shape[-1] for m in maps] == [4, 2]\n"
    )
    done = forked(["-c", code])
    assert done.returncode == 0, done.stderr


def test_dry_run_shows_models_pairs_and_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([recipe(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for words in ("student maps", "teacher maps", "neck:0", "pairs", "parameters", "FLOPs", "memory", "loss"):
        assert words in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["studnet.backbone=x"], "student"),
        (["training.learning_rate='5e-4'"], "training.learning_rate"),
        (["data.path=/nowhere/at/all"], "data.path"),
        (["data.test_split=holdout"], "holdout"),
        (["teacher.config=null", "teacher.model=/nowhere/at/all", "teacher.fit=null"], "teacher"),
        (["distill.terms.0.loss=candk"], "cankd"),
        (["distill.task_weight=0", "teacher.fit=null", "baseline=false"], "task: features"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    file = recipe(tmp_path, distill={"terms": [{"loss": "cankd"}]})
    assert train.main([file, *overrides]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err
    assert shown.err.startswith("error: ")


def test_another_recipe_in_the_same_folder_is_refused_and_restart_allows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, baseline=False, teacher=None)
    assert train.main([file]) == 0
    assert train.main([file, "training.learning_rate=0.1"]) == 2
    assert "training.learning_rate" in capsys.readouterr().err
    finished = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert train.main([file, "training.learning_rate=0.1", "--restart"]) == 0
    # Starting over moves the old run aside instead of mixing or losing it.
    assert (tmp_path / "run.before1" / "model.safetensors").read_bytes() == finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != finished


def test_input_that_failed_does_not_claim_the_folder(tmp_path: Path) -> None:
    file = recipe(tmp_path, baseline=False, teacher=None)
    assert train.main([file, "data.test_split=holdout"]) == 2
    assert train.main([file]) == 0


def test_a_teacher_whose_weights_do_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    file = recipe(tmp_path, baseline=False)
    assert train.main([file]) == 0
    weights = load_file(tmp_path / "run/teacher/model.safetensors")
    gone = next(name for name in weights if "backbone" in name)
    del weights[gone]
    save_file(weights, tmp_path / "run/teacher/model.safetensors", metadata={"format": "pt"})
    changes = ["teacher.fit=null", "teacher.config=null", f"teacher.model={tmp_path}/run/teacher"]
    assert train.main([file, *changes, f"output_dir={tmp_path}/second"]) == 2
    assert gone in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_goes_on(tmp_path: Path) -> None:
    file = recipe(tmp_path, baseline=False, teacher=None)
    words = ("-m", "cankd_hf.train", file, "training.max_steps=2000", "training.save_strategy=no")
    process = Forked(words)
    process.wait_for("'loss'")
    process.send_signal(signal.SIGINT)
    done = process.wait(120)
    assert done.returncode == 130, done.stderr
    assert "continues from it" in done.stderr
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    reached = int(checkpoints[0].name.partition("-")[2])
    process = Forked(words)
    assert f"checkpoint-{reached}" in process.wait_for("goes on from", "err")
    process.send_signal(signal.SIGTERM)
    process.wait(120)


LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "cankd_hf.train")


def test_two_processes_asked_and_one_started_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path)
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["python", *LAUNCH, file])  # of the parent
    assert train.main([file]) == 2
    assert "2 processes were asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_the_launcher_asks_for_two_processes_and_starts_one(tmp_path: Path) -> None:
    words = [sys.executable, *LAUNCH, recipe(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and "2 processes were asked for" in done.stderr


def _dinov2() -> dict[str, object]:
    return {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
    }
