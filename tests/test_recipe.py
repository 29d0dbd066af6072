"""Recipes: what is shipped parses, what is wrong is told with place and fix, all at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.distill import DistillConfig, Guard, LossTerm, Share
from cankd_hf.config.reading import load_data_config
from cankd_hf.config.recipe import Recipe, recipe_differences, recipe_to_yaml
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.losses import LOSSES
from cankd_hf.runs.recipe import load_recipe, parse_recipe

from .recipe_tables import COMPARISONS, PAGE, comparison_tables, rendered, tables

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = "output_dir: out\ndata:\n  path: shapes\nstudent:\n  model: some/model\n"
TAUGHT = SMALL + "teacher:\n  model: some/teacher\n"


def shipped(path: Path) -> Recipe:
    """A shipped recipe, with a folder where it asks for one."""
    given = ["data.path=folder"] if "path: ???" in path.read_text(encoding="utf-8") else []
    return load_recipe(path, given)


def problems(text: str, *overrides: str) -> list[str]:
    """Everything that is said about a bad recipe."""
    with pytest.raises(InputError) as caught:
        parse_recipe(text, overrides, "x.yaml")
    return caught.value.problems


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_parses_and_comes_back_equal(path: Path) -> None:
    recipe = shipped(path)
    saved = recipe_to_yaml(recipe)
    assert parse_recipe(saved) == recipe
    assert recipe_differences(saved, recipe) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_begins_with_command_hardware_and_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comment = text[: re.search(r"^(?!#)", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert f"-m cankd_hf.train recipes/{path.name}" in comment
    assert "Hardware:" in comment
    assert "easured" in comment
    # One recipe trains several teachers, and each of its commands names a folder.
    assert shipped(path).output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_named_in_comments_exist(path: Path) -> None:
    for name in re.findall(r"recipes/(\w+\.yaml)", path.read_text(encoding="utf-8")):
        assert (ROOT / "recipes" / name).is_file()


def test_the_papers_cityscapes_recipes() -> None:
    for path in RECIPES:
        if not path.stem.startswith("cityscapes"):
            continue
        recipe = shipped(path)
        training = recipe.training
        assert (training["optim"], training["learning_rate"], training["max_steps"]) == ("sgd", 0.01, 80000)
        assert (training["lr_scheduler_type"], training["lr_scheduler_kwargs"]["power"]) == ("polynomial", 0.9)
        assert recipe.data.crop_size == [512, 1024]
        if recipe.teacher is not None:
            (term,) = recipe.distill.terms
            assert (term.loss, term.weight, term.pairs) == ("cankd", 10.0, [[-1, -1]])


def test_overrides_go_through_the_same_checks() -> None:
    recipe = parse_recipe(
        TAUGHT, ["training.learning_rate=5e-4", "data.crop_size=[64,96]", "distill.terms[0].weight=3", "seed=7"]
    )
    assert recipe.training["learning_rate"] == 5e-4
    assert recipe.data.crop_size == [64, 96]
    assert recipe.distill.terms[0].weight == 3.0
    assert recipe.seed == 7
    assert problems(TAUGHT, "trainig.learning_rate=1") == [
        "trainig (command line): unknown key; did you mean 'training'?"
    ]
    (problem,) = problems(SMALL, "seed")
    assert "expected section.key=value, got 'seed'" in problem
    (problem,) = problems(TAUGHT, "distill.terms.0.weight=3", "distill.terms.4.weight=3")
    assert problem.startswith("distill.terms.4.weight (command line): the list distill.terms has items 0 to 0")


def test_without_a_teacher_a_recipe_is_plain_training() -> None:
    text = TAUGHT + "baseline: true\ndistill:\n  terms:\n    - {loss: cankd}\n"
    assert parse_recipe(text).baseline
    alone = parse_recipe(text, ["teacher=null"])
    assert (alone.teacher, alone.distill.terms, alone.baseline) == (None, [], False)


def test_a_teacher_alone_means_cankd_with_the_papers_weight() -> None:
    (term,) = parse_recipe(TAUGHT).distill.terms
    assert (term.loss, term.weight, term.pairs) == ("cankd", 10.0, "auto")


def test_all_errors_are_told_at_once_with_path_and_line() -> None:
    text = """output_dir: out
data:
  pth: shapes
  path: shapes
  flip: "0.5"
student:
  model: a
  trust_remote_code: "yes"
training:
  learning_rate: "5e-4"
  max_steps: 10.5
  lr_scheduler_typ: cosine
distill:
  terms:
    - {loss: cankdd}
    - {loss: cankd, name: b, options: {afinity: dot_product}}
"""
    assert sorted(problems(text)) == sorted(
        [
            "data.pth (x.yaml:3): unknown key; did you mean 'path'?",
            "data.flip (x.yaml:5): expected a number, got the text '0.5'; write it without quotes: 0.5",
            "student.trust_remote_code (x.yaml:8): expected true or false, got the text 'yes'; write true or false, "
            "without quotes",
            "training.learning_rate (x.yaml:10): expected a number, got the text '5e-4'; write it without quotes: "
            "5e-4",
            "training.max_steps (x.yaml:11): expected a whole number, got 10.5; round it",
            "training.lr_scheduler_typ (x.yaml:12): unknown key; did you mean 'lr_scheduler_type'?",
            f"distill.terms.0.loss (x.yaml:15): expected one of {', '.join(LOSSES)}, got 'cankdd'; "
            "did you mean 'cankd'?",
            "distill.terms.1.options.afinity (x.yaml:16): unknown key; did you mean 'affinity'?",
        ]
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task=segmentatoin", "did you mean 'segmentation'?"),
        ("learning_rate=1e-3", "did you mean 'training.learning_rate'?"),
        ("data=shapes", "write it as data.path: shapes"),
        ("teacher=facebook/dinov2-base", "write it as teacher.model: facebook/dinov2-base"),
        ("data.crop_size=64", "expected [height, width] or null, got 64; write a list: [64, 64]"),
        ("data.crop_size=[64]", "data.crop_size (command line): expected [height, width] or null"),
        ("data.path=???", "expected a value from you; give it on the command line: data.path=..."),
        ("data.name=3", 'write it in quotes: "3"'),
        ("data.on_error=ignore", "expected one of stop, skip, got 'ignore'"),
        ("data.streaming=true", "set training.max_steps"),
        (
            "student.config={model_type: resnet}",
            "expected exactly one of model, config and backbone, got model and config",
        ),
        ("student.model=null", "backbone, got none"),
        ("student.fpn={fpn_channels: 8}", "count for student.backbone only"),
        ("teacher.dtype=int8", "teacher.dtype (command line): expected one of auto, float32"),
        ("teacher.fit.max_step=3", "did you mean 'max_steps'?"),
        ("teacher.config={model_type: resnett}", "did you mean resnet?"),
        ("distill.terms={loss: cankd}", "write a list: each item starts with `- `"),
        ("distill.terms=[{weight: -1}]", "expected a number of at least 0"),
        ("distill.terms=[{weight: '5'}]", "write it without quotes: 5"),
        ("distill.terms=[{loss: cankd}, {loss: cankd}]", "give it another `name`"),
        ("distill.terms=[{options: {affinity: dot}}]", "expected one of dot_product"),
        ("distill.grid=fine", "did you mean 'finer'?"),
        ("distill.task_weight=-1", "expected a number of at least 0"),
        ("training.hub_token=hf_secret", "set the environment variable HF_TOKEN"),
        ("hub.token=hf_secret", "hub.token (command line): tokens are not taken"),
        ("hub.strategy=never", "expected one of end, every_save, checkpoint, all_checkpoints, got 'never'"),
        ("hub={id: me/a, privat: true}", "did you mean 'private'?"),
        ("training.seed=1", "belongs to the top level of the recipe"),
        ("training.warmup_ratio=0.1", "write warmup_steps"),
        ("training.lr_scheduler_type=cosin", "did you mean 'cosine'?"),
        ("training.report_to=3", "expected text or a list of texts or null"),
        ("seed=1.5", "expected a whole number, got 1.5; round it"),
        ("seed=true", "expected a whole number, got true"),
    ],
)
def test_bad_input_is_told_with_its_fix(override: str, said: str) -> None:
    found = problems(SMALL, override)
    assert any(said in problem for problem in found), found
    assert not any("hf_secret" in problem for problem in found)


def test_settings_of_a_pyramid_and_of_nested_configs_are_checked() -> None:
    text = "output_dir: o\ndata: {path: shapes}\nstudent:\n  backbone: {model_type: resnet, hidden_size: [8]}\n"
    text += "  fpn: {fpn_channel: 3}\nteacher:\n  config:\n    model_type: cankd_fpn\n    haed: psp\n"
    # The structure first, all of it at once; then, also all at once, what needs the classes of the models.
    assert problems(text) == ["student.fpn.fpn_channel (x.yaml:5): unknown key; did you mean 'fpn_channels'?"]
    text = text.replace("fpn_channel:", "fpn_channels:")
    assert sorted(problems(text)) == [
        "student.backbone.hidden_size (x.yaml:4): no such key for resnet; did you mean hidden_sizes?",
        "teacher.config.haed (x.yaml:9): no such key for cankd_fpn; did you mean head?",
    ]
    (problem,) = problems(
        text.replace("hidden_size:", "hidden_sizes:").replace("haed", "head"), "student.fpn={head: x}"
    )
    assert "expected one of fpn, psp, aspp, got 'x'" in problem


def test_label_free_recipes_need_something_to_learn() -> None:
    assert "without a teacher" in problems(SMALL, "distill.task_weight=0")[0]
    assert "distill.terms with a weight above 0" in problems(TAUGHT, "distill.task_weight=0", "distill.terms=[]")[0]
    assert problems(TAUGHT, "distill.task_weight=0", "baseline=true")[0].startswith("baseline (command line)")
    assert parse_recipe(TAUGHT, ["distill.task_weight=0"]).distill.task_weight == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2", "not valid YAML: line 2"),
        ("- 1", "expected sections such as `data:`"),
        ("", "output_dir (x.yaml): missing"),
        (SMALL + "seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        (SMALL + "task: ${oc.env:HOME}\n", "recipes run no code"),
        (SMALL + "task: ${oc.${data.path}:HOME}\n", "recipes run no code"),
        (SMALL + "task: ${nothing}\n", "Interpolation key 'nothing' not found"),
    ],
)
def test_bad_yaml(text: str, said: str) -> None:
    assert any(said in problem for problem in problems(text))


def test_references_are_followed() -> None:
    recipe = parse_recipe(SMALL.replace("output_dir: out", "output_dir: runs/${data.path}"))
    assert recipe.output_dir == "runs/shapes"


def test_yaml_no_is_a_strategy() -> None:
    assert parse_recipe(SMALL, ["training.eval_strategy=no"]).training["eval_strategy"] == "no"


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(SMALL)
    with pytest.raises(InputError, match=r"did you mean '.*quickstart\.yaml'"):
        load_recipe(tmp_path / "quikstart.yaml")


def test_differences_between_a_saved_recipe_and_a_new_one() -> None:
    saved = recipe_to_yaml(parse_recipe(TAUGHT, ["training.max_steps=10"]))
    now = parse_recipe(TAUGHT, ["training.max_steps=20", "seed=1", "data.cache=true", "training.bf16=true"])
    assert recipe_differences(saved, now) == [
        "seed: 42 -> 1",
        "training.max_steps: 10 -> 20",
        "training.bf16: absent -> True",
    ]


def test_the_data_section_of_a_saved_recipe(tmp_path: Path) -> None:
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe_to_yaml(parse_recipe(TAUGHT, ["data.flip=0"])))
    config = load_data_config(saved, ["data.path=elsewhere"])
    assert (config.path, config.flip) == ("elsewhere", 0.0)
    assert load_data_config(None, ["data.path=elsewhere"]).path == "elsewhere"
    with pytest.raises(InputError, match=r"data\.path .*: expected a folder") as caught:
        load_data_config(None, ["training.max_steps=3", "data.crop=3"])
    assert len(caught.value.problems) == 3


def test_saved_recipes_are_plain_yaml() -> None:
    assert yaml.safe_load(recipe_to_yaml(parse_recipe(TAUGHT)))["teacher"]["model"] == "some/teacher"


def test_the_page_about_recipes_is_in_step() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == rendered(page, tables()), "run: python -m tests.recipe_tables"
    other = COMPARISONS.read_text(encoding="utf-8")
    assert other == rendered(other, comparison_tables()), "run: python -m tests.recipe_tables"
    for path in RECIPES:
        assert f"`{path.stem}`" in page, f"docs/recipes.md does not name {path.stem}"


def test_a_recipe_of_an_earlier_version_lacks_keys_that_had_their_defaults() -> None:
    given = [
        "distill.terms=[{loss: cankd}, {loss: kl, weight: {share: 0.1}}]",
        "phases=[{name: first, share: 0.5}, {name: then, share: 0.5}]",
        "teacher.cache.views=4",
    ]
    now = parse_recipe(TAUGHT, given)
    old = yaml.safe_load(recipe_to_yaml(now))
    lost = [(old, "schedule"), (old["data"], "strong"), (old["student"], "inherit"), (old["distill"], "task_weight")]
    lost += [(old["distill"]["terms"][1], "fade"), (old["phases"][1], "carry"), (old["teacher"]["cache"], "codec")]
    for section, key in lost:
        del section[key]
    saved = yaml.safe_dump(old)
    assert recipe_differences(saved, now) == []
    changed = parse_recipe(
        TAUGHT, [*given, "distill.terms.1.fade=[0.1,0.2]", "teacher.cache.codec=exact", "data.strong.grey=0.5"]
    )
    assert set(recipe_differences(saved, changed)) == {
        "distill.terms.1.fade.0: absent -> 0.1",
        "distill.terms.1.fade.1: absent -> 0.2",
        f"teacher.cache.codec: {now.teacher.cache.codec} -> exact",  # type: ignore[union-attr]
        "data.strong.grey: 0.2 -> 0.5",
    }
    named = parse_recipe(SMALL.split("student")[0], ["students.a.model=x", "teacher.model=t"])
    old = yaml.safe_load(recipe_to_yaml(named))
    del old["students"]["a"]["inherit"], old["distill"]["terms"]
    assert recipe_differences(yaml.safe_dump(old), named) == []


def test_sections_in_python_may_be_mappings() -> None:
    """As in a recipe; what is wrong with one is told as there."""
    assert DataConfig(path="shapes", strong={"grey": 0.5}).strong == StrongConfig(grey=0.5)  # type: ignore[arg-type]
    cache: Any = {"views": 3}
    assert TeacherConfig(model="x", cache=cache).cache == CacheConfig(views=3)
    assert DistillConfig(guard={}).guard == Guard()  # type: ignore[arg-type]
    assert LossTerm(weight={"share": 0.1}).weight == Share(share=0.1)  # type: ignore[arg-type]
    for given, said in (
        ({"gray": 0.5}, "data.strong.gray: unknown key; did you mean 'grey'?"),
        ({"grey": 5}, "data.strong.grey: expected a number from 0 to 1, got 5"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            DataConfig(path="shapes", strong=given).check_values()  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"teacher\.cache\.views: expected a number of views"):
        TeacherConfig(model="x", cache={}).check()  # type: ignore[arg-type]
