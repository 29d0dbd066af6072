"""Push -> fresh process -> from_pretrained by id -> equal outputs, and what must never be pushed never is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from .stand_in import TOKEN, Hub, problems

STUDENT = {"config.json", "model.safetensors", "preprocessor_config.json", "distillation.json", "README.md"}
CODE = {f"{name}_cankd_fpn.py" for name in ("configuration", "deformable", "levels", "modeling")}
HEADS = ("conventions", "detection_heads", "cascade", "fcos", "prototypes", "reppoints")
DETECTOR_CODE = {f"{name}_cankd_fpn.py" for name in HEADS}
DETECTOR_CODE.add("modeling_cankd_fpn_detection.py")
FORBIDDEN = re.compile(r"optimizer|scheduler|scaler|rng_state|trainer_state|training_args|distiller|teacher_manifest")


@pytest.fixture(scope="module")
def pushed(hub: Hub, python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `pusher.py` pushes; the first upload of weights breaks off."""
    folder = tmp_path_factory.mktemp("pushed")
    hub.refuse_uploads = 1
    python("-m", "tests.hub.pusher", str(folder), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def said(pushed: Path) -> dict[str, Any]:
    """Exit code, output and errors of each push command."""
    return json.loads((pushed / "said.json").read_text())


def test_the_student_alone_is_pushed_with_its_code_and_card(hub: Hub, pushed: Path) -> None:
    files = {repo: set(held.branches["main"][-1]) for repo, held in hub.repos.items()}
    recipe = {"recipe.yaml"}
    assert files["me/segformer"] == STUDENT
    assert files["me/backbone"] == STUDENT == files["me/detr"]
    assert files["me/detector"] == STUDENT | CODE | DETECTOR_CODE
    fpn = STUDENT | CODE | recipe
    assert files["me/every_save"] == fpn
    assert files["me/checkpoint"] == fpn | {f"last-checkpoint/{name}" for name in fpn}
    assert files["me/fpn"] == fpn | {f"checkpoint-{step}/{name}" for step in (1, 2) for name in fpn}
    assert files["me/end"] == set(), "`end` pushes when asked, not while training"
    everything = {
        name for held in hub.repos.values() for branch in held.branches.values() for c in branch for name in c
    }
    assert not [name for name in everything if FORBIDDEN.search(name)]
    # Each intermediate commit of a student holds its code, so that it loads from the first one on.
    assert all(set(commit) >= CODE for commit in hub.repos["me/fpn"].branches["main"][1:])
    assert [hub.repos[f"me/{name}"].private for name in ("segformer", "backbone", "fpn")] == [False, True, True]
    weights = hub.repos["me/fpn"].branches["main"][-1]["model.safetensors"]
    assert weights == (pushed / "fpn" / "model.safetensors").read_bytes()


def test_a_run_pushes_its_student_alone_at_its_end_with_all_scores(
    hub: Hub, said: dict[str, Any], pushed: Path
) -> None:
    assert said["run"][0] == 0
    held = hub.repos["me/run"]
    assert held.private and len(held.branches["main"]) == 2, "one commit: no arm pushed for itself"
    files = held.branches["main"][-1]
    assert set(files) == STUDENT | CODE | {"recipe.yaml", "results.json"}
    assert files["model.safetensors"] == (pushed / "run" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and "- shapes" in card
    assert all(f"| {arm} |" in card for arm in ("student alone", "student distilled", "teacher"))
    assert "trained in the same run" in card and not problems(card)
    assert (pushed / "run" / "README.md").is_file() and "me/alone" not in hub.repos


def test_no_request_holds_a_secret_outside_of_its_header(hub: Hub, pushed: Path) -> None:
    assert len(hub.requests) > 50
    secrets = (TOKEN, "wrong" * 7)
    for request in hub.requests:
        where = f"{request.method} {request.path}"
        assert not any(secret in request.path or secret.encode() in request.body for secret in secrets), where
        shown = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
        assert not any(secret in str(shown) for secret in secrets), where


def test_a_broken_push_is_told_and_can_be_repeated(hub: Hub, said: dict[str, Any], pushed: Path) -> None:
    code, _, errors = said["broken"]
    assert code == 2 and errors.startswith("error: me/segformer: ") and errors.count("\n") == 1, errors
    assert said["repeated"][0] == 0, said["repeated"]
    assert (pushed / "segformer" / "model.safetensors").is_file()
    assert said["branch"][0] == 0 and set(hub.repos["me/segformer"].branches) == {"main", "first"}
    assert "private" in said["private"][1]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("foreign", "does not let you write"),
        ("taken", "does not let you write"),
        ("foreign run", "does not let you write"),
        ("taken run", "does not let you write"),
        ("name", "expected a repository name"),
        ("no token", "HF_TOKEN"),
        ("wrong token", "does not accept the token"),
        ("no network", "cannot be reached"),
        ("public", "--public"),
        ("scored nothing", "me/nothing: expected a saved student"),
        ("scored private", "me/fpn: expected a saved student"),
        ("scored name", "me/a b"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(said: dict[str, Any], case: str, words: str) -> None:
    code, _, errors = said[case]
    assert code == 2 and words in errors and errors.startswith("error: ") and errors.count("\n") == 1, errors


def test_cards_name_the_repository_and_are_valid(hub: Hub, pushed: Path) -> None:
    for repo in ("me/fpn", "me/segformer", "me/backbone", "me/every_save", "me/detector", "me/detr"):
        card = hub.repos[repo].branches["main"][-1]["README.md"].decode()
        assert not problems(card), repo
        assert f'"{repo}"' in card and str(pushed) not in card, card
    data = yaml.safe_load(hub.repos["me/fpn"].branches["main"][-1]["README.md"].decode().split("---\n")[1])
    assert data["license"] == "apache-2.0" and data["datasets"] == ["me/pictures"]
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "me/pictures"


LOADER = """
import inspect, sys, torch
{preamble}
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, ResNetBackbone, pipeline
from transformers import AutoModelForObjectDetection
cases = torch.load("cases.pt")
trust = {trust}
models = {{
    "fpn": AutoModelForSemanticSegmentation.from_pretrained("me/fpn", **trust),
    "segformer": AutoModelForSemanticSegmentation.from_pretrained("me/segformer", revision={revision!r}),
    "backbone": ResNetBackbone.from_pretrained("me/backbone"),
    "detector": AutoModelForObjectDetection.from_pretrained("me/detector", **trust),
    "detr": AutoModelForObjectDetection.from_pretrained("me/detr"),
}}
for kind, (images, expected) in cases.items():
    with torch.no_grad():
        found = models[kind](pixel_values=images)
    torch.testing.assert_close(found.feature_maps[-1] if kind == "backbone" else found.logits, expected)
    AutoImageProcessor.from_pretrained("me/" + kind)
for kind in ("fpn", "detector"):
    assert type(models[kind]).__module__.split(".")[0] == {home!r}
AutoModelForSemanticSegmentation.from_pretrained("me/checkpoint", subfolder="last-checkpoint", **trust)
{rest}
"""
CARDS = """
for kind in cases:
    card = open(hf_hub_download("me/" + kind, "README.md")).read()
    # an early client asks the real Hub, whatever HF_ENDPOINT says
    if "https://huggingface.co/api" not in inspect.getsource(ModelCard.validate):
        ModelCard(card).validate()
    code = card.split("```python\\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code, {})
"""
PINNED = """
first = AutoModelForSemanticSegmentation.from_pretrained("me/fpn", revision={commit!r})
assert any((a != b).any() for a, b in zip(first.parameters(), models["fpn"].parameters()))
from cankd_hf.models.backbones import load_backbone
load_backbone("me/backbone")
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""


@pytest.mark.parametrize(
    "installed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["without cankd_hf", "with import cankd_hf"]
)
def test_students_load_by_id_in_a_fresh_process(
    hub: Hub, pushed: Path, python: Callable[..., str], tmp_path: Path, installed: bool
) -> None:
    held = hub.repos["me/fpn"]
    first = held.sha(held.branches["main"], 1)
    script = LOADER.format(
        preamble="import cankd_hf" if installed else 'sys.modules["cankd_hf"] = None  # importing it fails',
        trust="{}" if installed else "{'trust_remote_code': True}",
        home="cankd_hf" if installed else "transformers_modules",
        revision="first" if installed else hub.repos["me/segformer"].commit("main"),
        rest=PINNED.format(commit=first) if installed else CARDS,
    )
    torch.save(torch.load(pushed / "cases.pt"), tmp_path / "cases.pt")
    Image.effect_noise((60, 48), 80).convert("RGB").save(tmp_path / "photo.jpg")
    shown = python("-c", script, cwd=tmp_path)
    assert installed or "(60, 48)" in shown
