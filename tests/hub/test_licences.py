"""What the licences of teachers, data and first weights let through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import ResNetBackbone, ResNetConfig

from cankd_hf.errors import InputError
from cankd_hf.hub import licences
from cankd_hf.hub.card import render_card, write_card
from cankd_hf.hub.facts import Facts, licence_of, planned_facts
from cankd_hf.hub.licences import TERMS, check_licences, inherited, known_name, sources, told
from cankd_hf.hub.upload import plan
from cankd_hf.teachers.load import load_teacher

# Under which of these a student may be shared whose teacher has the licence of the row.
STUDENTS = ["unknown", "apache-2.0", "cc-by-nc-4.0", "agpl-3.0", "dinov3-license"]
LETS_THROUGH = {
    "apache-2.0": "yyyyy",
    "mit": "yyyyy",
    "bsd-3-clause": "yyyyy",
    "cc-by-4.0": "yyyyy",
    "nvidia-open-model-license": "yyyyy",
    "cc-by-sa-4.0": "nnnnn",
    "cc-by-nc-4.0": "ynynn",
    "nvidia-source-code-license": "ynynn",
    "cc-by-nc-sa-4.0": "nnnnn",
    "cc-by-nd-4.0": "nnnnn",
    "gpl-3.0": "nnnnn",
    "agpl-3.0": "nnnyn",
    "dinov3-license": "nnnny",
    "fair-noncommercial-research-license": "nnnnn",
    "apple-amlr": "nnnnn",
    "openrail": "nnnnn",
}


def facts(hub: dict[str, Any] | None = None, **teachers: str) -> Facts:
    recipe = {"teachers": {name: {"model": model} for name, model in teachers.items()}, "hub": hub}
    return planned_facts({**recipe, "data": {"path": "shapes"}})


def cards(monkeypatch: pytest.MonkeyPatch, known: dict[str, str | None]) -> None:
    monkeypatch.setattr(licences, "licence_of", lambda model, revision=None, kind="model": known.get(model))


@pytest.mark.parametrize("licence", LETS_THROUGH)
def test_what_a_teachers_licence_lets_through(licence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"me/teacher": licence})
    found = ""
    for student in [*STUDENTS, licence]:
        try:
            check_licences(facts(teacher="me/teacher"), student)
            found += "y"
        except InputError as error:
            (line,) = error.problems
            assert "me/teacher (teacher)" in line and TERMS[licence].rule in line and "hub.cleared" in line
            found += "n"
    # Its own licence always does, unless derivatives may not be shared at all.
    assert found == LETS_THROUGH[licence] + ("n" if "nd" in licence.split("-") else "y")
    check_licences(facts(teacher="me/teacher"), "apache-2.0", cleared=["me/teacher"])
    check_licences(facts({"cleared": ["me/teacher"]}, teacher="me/teacher"), "apache-2.0")


def test_two_teachers_that_bind_differently_leave_no_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"a/one": "dinov3-license", "b/two": "agpl-3.0", "c/free": "mit"})
    both = facts(one="a/one", two="b/two", free="c/free")
    assert inherited(both) is None
    for licence in ("dinov3-license", "agpl-3.0"):
        with pytest.raises(InputError) as error:
            check_licences(both, licence)
        assert len(error.value.problems) == 1
    assert inherited(facts(one="a/one", free="c/free")) == "dinov3-license"
    assert inherited(facts(free="c/free")) is None


def test_an_unknown_licence_is_told_and_must_be_stated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"a/silent": None, "a/odd": "my-own-terms", "a/unknown": "unknown"})
    for model in ("a/silent", "a/odd", "a/unknown"):
        with pytest.raises(InputError, match="state it once: hub.licenses"):
            check_licences(facts(teacher=model), "mit")
        check_licences(facts({"licenses": {model: "Apache License 2.0"}}, teacher=model), "mit")
        check_licences(facts(teacher=model), "mit", stated={model: "mit"})
        check_licences(facts(teacher=model), "mit", owner="a") if model != "a/odd" else None
    assert told(facts(teacher="a/silent")) == ["a/silent (teacher): its licence is not known"]
    assert "its terms are not listed here" in told(facts(teacher="a/odd"))[0]
    local = told(facts(teacher="/home/me/secret/teacher"))
    assert local == ["local teacher (teacher): its licence is not known"]  # a card is public, a path is not


def test_names_of_nothing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"a/silent": None})
    with pytest.raises(InputError) as error:
        check_licences(facts({"licenses": {"a/slient": "mit"}, "cleared": ["a/other"]}, teacher="a/silent"), "mit")
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "hub.licenses",
        "hub.cleared",
        "licence of a/silent (teacher)",
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Apache License 2.0", "apache-2.0"),
        ("DINOv3 License", "dinov3-license"),
        ("dinov3", "dinov3-license"),
        ("NVIDIA Open Model License Agreement", "nvidia-open-model-license"),
        ("FAIR Noncommercial Research License", "fair-noncommercial-research-license"),
        ("AGPL-3.0", "agpl-3.0"),
        ("agpl-3.0-or-later", "agpl-3.0"),
        ("GPL-3.0-only", "gpl-3.0"),
        ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("MIT License", "mit"),
        ("something else", "something-else"),
    ],
)
def test_other_spellings(written: str, meant: str) -> None:
    assert known_name(written) == meant


def test_every_source_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {})
    trained = tmp_path / "teacher"  # with this package
    trained.mkdir()
    (trained / "distillation.json").write_text(json.dumps({"teacher": {"model": "meta/dino", "revision": "a"}}))
    recipe = {"data": {"path": "sets/streets"}, "student": {"backbone": "timm/resnet18.a1_in1k"}}
    (trained / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    bare = tmp_path / "bare"
    bare.mkdir()
    fitted = {"config": {"backbone_config": {"pretrained": "timm/vit.x"}}, "fit": {"max_steps": 3}}
    student = planned_facts(
        {
            "data": {"path": "me/photos", "unlabelled": "me/more"},
            "student": {"backbone": {"pretrained": "microsoft/resnet-18"}},
            "teachers": {
                "ours": {"model": str(trained)},
                "bare": {"model": str(bare)},
                "fitted": fitted,
                "theirs": {"model": "torchvision/fcn_resnet50"},
            },
        }
    )
    found = {source.name: source.role for source in sources(student)}
    assert found == {
        "microsoft/resnet-18": "first weights",
        "timm/resnet18.a1_in1k": "first weights of the teacher",
        "meta/dino": "teacher of the teacher",
        "sets/streets": "data of the teacher",
        str(bare): "teacher",
        "timm/vit.x": "first weights of the teacher",
        "torchvision/fcn_resnet50": "teacher",
        "me/photos": "data",
        "me/more": "data",
    }
    # Nothing is inherited from what the run makes itself.
    assert sources(planned_facts({"data": {"path": "shapes"}, "teacher": {"config": {}, "fit": {}}})) == []


def test_what_is_recorded_of_local_models_leads_to_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run records the last part of a local path alone; its recipe has the whole one."""
    cards(monkeypatch, {})
    earlier = tmp_path / "earlier"  # a student of this package
    earlier.mkdir()
    (earlier / "distillation.json").write_text(json.dumps({"teacher": {"model": "meta/dino"}}))

    def found(run: dict[str, Any], **recipe: Any) -> dict[str, str]:
        return {one.name: one.role for one in sources(Facts({}, run, {}, {"data": {"path": "shapes"}, **recipe}))}

    recorded = {"teacher": {"model": "earlier"}}
    assert found(recorded, teacher={"model": str(earlier)}) == {"meta/dino": "teacher of the teacher"}
    assert found(recorded, teacher={"model": "moved/since/earlier"}) == {"moved/since/earlier": "teacher"}
    assert found({"teacher": {"model": "earlier", "local": True}}) == {"earlier": "teacher"}
    for how in ({"fit": {"max_steps": 3}}, {"adapt": {"tune": "head"}}):  # trained in the run, from these weights
        given = {"model": "facebook/dinov3-vits16", **how}
        assert found({"teacher": {"model": "teacher"}}, teacher=given) == {
            "facebook/dinov3-vits16": "first weights of the teacher"
        }
    for student in ({"backbone": str(earlier)}, {"model": str(earlier)}):
        assert found({}, student=student) == {"meta/dino": "teacher of the first weights"}
    nested = {"config": {"backbone_config": {"pretrained": "microsoft/resnet-18"}}}
    assert found({}, student=nested) == {"microsoft/resnet-18": "first weights"}
    assert found({"teacher": {"model": "ResNetBackbone"}}) == found({"teacher": {"model": "random weights"}}) == {}


def test_timm_knows_the_licence_of_its_weights() -> None:
    """Without the Hub, and for a name without a tag, which stands for the weights that timm takes by default."""
    found = {one.name: one.licence for one in sources(facts(a="timm/vit_small_patch16_dinov3", b="timm/resnet18"))}
    assert found == {"timm/vit_small_patch16_dinov3.lvd1689m": "dinov3-license", "timm/resnet18.a1_in1k": "apache-2.0"}
    assert sources(facts(a="timm/no_such_model"))[0].licence is None


def test_a_teacher_in_memory_is_named_by_where_it_was_loaded_from(tmp_path: Path) -> None:
    ResNetBackbone(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path)
    assert load_teacher(ResNetBackbone.from_pretrained(tmp_path)).manifest()["model"] == str(tmp_path)
    assert load_teacher(ResNetBackbone(ResNetConfig())).manifest()["model"] == "ResNetBackbone"


def test_the_card_names_clauses_and_carries_the_inherited_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"facebook/dinov3-vits16": "dinov3-license"})
    made = facts(teacher="facebook/dinov3-vits16")
    made.run["pipeline_tag"], made.config["model_type"] = "image-segmentation", "cankd_fpn"
    text = render_card(made, "me/student")
    data = ModelCard(text).data
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    assert "facebook/dinov3-vits16 (teacher): dinov3-license: derivative works only under this agreement" in text
    assert ModelCard(render_card(made, "me/student", licence="mit")).data.license == "mit"


def test_what_is_stated_at_the_push_stands_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {})
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    run = {
        "teachers": {"a": {"model": "me/one"}, "b": {"model": "me/two"}},
        "pipeline_tag": "image-feature-extraction",
    }
    (tmp_path / "distillation.json").write_text(json.dumps(run))

    def pushed() -> str:
        stated = {"me/one": "DINOv3 License", "me/two": "agpl-3.0"}
        files = {one.name: one for one in plan(tmp_path, "you/student", stated=stated, cleared=["me/two"])}
        return files["README.md"].text().decode()

    for written in (False, True):  # a new card, and the one that the run wrote
        if written:
            assert "me/one (teacher): its licence is not known" in write_card(tmp_path).read_text()
        text = pushed()
        assert "me/one (teacher): dinov3-license: derivative works only under this agreement" in text
        assert "me/two (teacher): agpl-3.0: " in text and "used by a permission of its own" in text
        assert ModelCard(text).data.license_name == "dinov3-license"
    stated = {"me/one": "apache-2.0", "me/two": "mit"}
    files = {one.name: one for one in plan(tmp_path, "you/student", stated=stated, licence="mit")}
    assert ModelCard(files["README.md"].text().decode()).data.license == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\nMine.\n")
    assert pushed().endswith("Mine.\n")


def test_a_push_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, {"facebook/dinov3-vits16": "dinov3-license"})
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "distillation.json").write_text(
        json.dumps({"teacher": {"model": "facebook/dinov3-vits16"}, "pipeline_tag": "image-feature-extraction"})
    )
    assert plan(tmp_path, "me/student")  # under the teacher's own
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"hub": {"license": "apache-2.0"}}))
    with pytest.raises(InputError, match=r"may only be shared under dinov3-license, got apache-2.0: .*1b i"):
        plan(tmp_path, "me/student")
    assert plan(tmp_path, "me/student", cleared=["facebook/dinov3-vits16"])


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("license: cc-by-nc-4.0\nlicense_name: mit", "cc-by-nc-4.0"),  # a name counts beside `other` alone
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ('license: "mit\\n<script>"', None),
        ("license: [mit]", None),
        (f"license: {'[' * 5000}", None),
    ],
)
def test_licences_of_cards_that_strangers_wrote(card: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    assert licence_of(str(tmp_path)) == found
