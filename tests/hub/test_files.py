"""Which files are a student, and what is refused before anybody is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from safetensors.torch import save_file
from transformers import ResNetBackbone, ResNetConfig

from cankd_hf import push, train
from cankd_hf.config.recipe import recipe_differences, recipe_to_yaml
from cankd_hf.errors import InputError
from cankd_hf.hub import upload
from cankd_hf.hub.files import student_files
from cankd_hf.hub.publish import open_target
from cankd_hf.hub.upload import check_target, open_repo, plan, push_in_background
from cankd_hf.runs import run as runner
from cankd_hf.runs.build import training_args
from cankd_hf.runs.recipe import load_recipe

LEFT = (
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
    "distiller.safetensors",
    "trainer_state.json",
    "notes.py",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved backbone among what training leaves behind."""
    saved = tmp_path / "run"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(saved)
    for name in LEFT:
        (saved / name).write_bytes(b"not for others")
    (saved / "recipe.yaml").write_text("task: features\n")
    return saved


def test_only_the_student_is_planned(folder: Path) -> None:
    assert {upload.name for upload in plan(folder, "me/x")} == {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "README.md",
    }


def test_the_home_folder_is_not_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    (folder / "recipe.yaml").write_text("data: {path: /home/alice/streets}\n")
    found = {upload.name: upload.text() for upload in plan(folder, "me/x") if upload.name.endswith((".yaml", ".md"))}
    assert found["recipe.yaml"] == b"data: {path: ~/streets}\n"
    assert b"alice" not in found["README.md"]
    assert "alice" in (folder / "recipe.yaml").read_text()


def test_sharded_weights_are_whole(folder: Path) -> None:
    model = ResNetBackbone.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    names = {file.name for file in student_files(folder)}
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 1 and shards | {"model.safetensors.index.json"} <= names
    (folder / sorted(shards)[0]).unlink()
    with pytest.raises(InputError, match=sorted(shards)[0]):
        student_files(folder)


def test_a_token_in_a_file_is_refused_and_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a1B2" * 9
    (folder / "recipe.yaml").write_text(f"hub_token: {token}\n")
    with pytest.raises(InputError, match="recipe.yaml: holds a Hub token") as caught:
        plan(folder, "me/x")
    assert token not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "an-own-secret")
    (folder / "recipe.yaml").write_text("note: an-own-secret\n")
    with pytest.raises(InputError, match="recipe.yaml"):
        plan(folder, "me/x")


def test_a_whole_training_module_is_no_student(folder: Path) -> None:
    save_file({"student.w": torch.zeros(1), "connectors.s0t0.w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"connectors\.s0t0\.w"):
        plan(folder, "me/x")


def test_folders_without_a_student(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push.main([str(folder.parent / "nowhere"), "me/x"]) == 2
    assert push.main([str(folder.parent), "me/x"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and "no folder" in shown[0] and "it holds students in run" in shown[1]


def test_a_dry_run_lists_files_and_needs_no_token(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert push.main([str(folder), "me/x", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert "model.safetensors" in shown and f"{size:,}" in shown and "optimizer" not in shown
    assert sorted(folder.iterdir()) == before


def test_offline_and_bad_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="HF_TOKEN"):
        check_target("me/x")
    with pytest.raises(InputError, match="expected a repository name"):
        check_target("me/a name")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        open_repo("me/x", token="not-used")


def test_ctrl_c_says_that_nothing_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("HF_TOKEN", "not-used")
    monkeypatch.setattr(upload._api, "create_repo", interrupted)
    assert push.main([str(folder), "me/x"]) == 130
    assert "the same command pushes again" in capsys.readouterr().err
    assert (folder / "model.safetensors").is_file()


def test_ctrl_c_while_a_run_pushes_keeps_the_run(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[object] = []

    def interrupted(*_: object, **__: object) -> None:
        pushed.append(_)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "open_target", lambda *_: None)
    monkeypatch.setattr(runner, "publish", interrupted)
    sizes = ["data.generated={train: 4, validation: 2, test: 2, size: 64}", "training.max_steps=2"]
    run = [f"output_dir={tmp_path}", "teacher=null", "training.use_cpu=true", "training.disable_tqdm=true"]
    command = [str(repo_root / "recipes" / "quickstart.yaml"), *sizes, *run]
    assert train.main(command) == 130
    assert "Interrupted; what was finished is kept, and the same command continues from it." in capsys.readouterr().err
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "results.json").read_text())["arms"][0]["steps"] == 2
    # The same command trains nothing again, and comes to the push.
    monkeypatch.setattr(runner, "publish", lambda *_: pushed.append("again"))
    assert train.main(command) == 0
    assert pushed[-1] == "again" and (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_push_in_the_background_fails_without_noise_and_from_a_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    seen = []

    def refused(repo: str, operations: list[CommitOperationAdd], **_: object) -> None:
        seen.extend(Path(op.path_or_fileobj) for op in operations if isinstance(op.path_or_fileobj, str))
        assert all(file.is_file() and folder not in file.parents for file in seen)
        raise RuntimeError("the line is down")

    monkeypatch.setattr(upload._api, "create_commit", refused)
    job = push_in_background(plan(folder, "me/x"), "me/x", "step 3")
    assert isinstance(job.exception(timeout=20), InputError)
    assert "step 3 was not pushed" in caplog.text and "the line is down" in caplog.text
    assert seen and not any(file.exists() for file in seen)


def test_a_run_that_may_not_push_is_told_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = SimpleNamespace(push_to_hub=True, process_index=0, hub_model_id="me/x")
    asked.hub_private_repo = asked.hub_revision = None
    with pytest.raises(InputError, match="me/x: pushing needs a token"):
        open_target(tmp_path, asked)
    assert open_target(tmp_path, SimpleNamespace(push_to_hub=False, process_index=0)) is None


def test_pushing_or_not_makes_no_other_run(repo_root: Path) -> None:
    recipe = repo_root / "recipes" / "quickstart.yaml"
    saved = recipe_to_yaml(load_recipe(recipe))
    pushing = load_recipe(recipe, ["training.push_to_hub=true", "training.hub_model_id=me/x"])
    assert recipe_differences(saved, pushing) == []
    pushing = load_recipe(recipe, ["hub={id: me/x, license: mit}"])
    assert recipe_differences(saved, pushing) == [] == recipe_differences(recipe_to_yaml(pushing), load_recipe(recipe))


def test_the_hub_section_fills_the_settings_of_the_trainer(repo_root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(repo_root / "recipes" / "quickstart.yaml", ["hub={id: me/x, strategy: checkpoint}"])
    args = training_args(recipe, tmp_path)
    assert args.push_to_hub and args.hub_model_id == "me/x" and args.hub_private_repo is True
    assert args.hub_strategy == "checkpoint" and args.hub_revision is None
    kept = load_recipe(repo_root / "recipes" / "quickstart.yaml", ["hub={push: false, license: mit}"])
    assert not training_args(kept, tmp_path).push_to_hub
    with pytest.raises(InputError) as caught:
        load_recipe(
            repo_root / "recipes" / "quickstart.yaml",
            ["hub.id=me/x", "training.hub_model_id=me/y", "training.push_to_hub=false"],
        )
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["hub.push", "hub.id"]
    assert "training.hub_model_id says 'me/y'" in str(caught.value)
