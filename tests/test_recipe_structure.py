"""Structure of recipes: told in a moment, without torch, from what the source declares; several teachers by name."""

from __future__ import annotations

import inspect
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from torch import Tensor, nn

from cankd_hf.config import declared
from cankd_hf.config.advice import describe
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import DistillConfig, LossTerm
from cankd_hf.config.parts import terms_of
from cankd_hf.config.reading import read_recipe
from cankd_hf.config.recipe import recipe_to_yaml
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.training import training_fields
from cankd_hf.errors import InputError, Problem
from cankd_hf.losses import LOSSES, FeatureLoss
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.tasks import TASKS, SegmentationTask
from cankd_hf.training.arguments import CanKDConfig

SMALL = "output_dir: out\ndata:\n  path: shapes\nstudent:\n  model: some/model\n"
TAUGHT = SMALL + "teachers:\n  dino: {model: some/teacher}\n  sam: {model: other/teacher}\n"
BAD = """task: segmentatoin
output_dir: ${nothing}
data:
  pth: shapes
  path: shapes
  flip: 1.5
  crop_size: "64"
  on_error: ignore
  max_eval_samples: -5
student:
  backbone: {model_type: resnet}
  fpn: {fpn_channel: 8}
teachers:
  dino: {model: some/model}
distill:
  terms:
    - {loss: cankdd}
    - {options: {afinity: gaussian}, teacher: dion}
training:
  lr_scheduler_typ: cosine
  eval_strategy: never
  learning_rate: "5e-4"
max_steps: 100
"""
TOLD = [
    ("task", 1, "did you mean 'segmentation'?"),
    ("output_dir", 2, "Interpolation key 'nothing' not found"),
    ("data.pth", 4, "unknown key; did you mean 'path'?"),
    ("data.flip", 6, "expected a number from 0 to 1, got 1.5"),
    ("data.crop_size", 7, "expected [height, width] or null, got the text '64'"),
    ("data.on_error", 8, "expected one of stop, skip, got 'ignore'"),
    ("data.max_eval_samples", 9, "expected a whole number of at least 1 or null, got -5"),
    ("student.fpn.fpn_channel", 12, "unknown key; did you mean 'fpn_channels'?"),
    ("distill.terms.0.loss", 17, "did you mean 'cankd'?"),
    ("distill.terms.1.options.afinity", 18, "unknown key; did you mean 'affinity'?"),
    ("distill.terms.1.teacher", 18, "expected one of dino, got 'dion'; did you mean 'dino'?"),
    ("training.lr_scheduler_typ", 20, "did you mean 'lr_scheduler_type'?"),
    ("training.eval_strategy", 21, "expected one of no, steps, epoch, got 'never'"),
    ("training.learning_rate", 22, "write it without quotes: 5e-4"),
    ("max_steps", 23, "did you mean 'training.max_steps'?"),
]


def problems(text: str, *overrides: str) -> list[str]:
    """Everything that is said about a bad recipe."""
    with pytest.raises(InputError) as caught:
        parse_recipe(text, overrides, "x.yaml")
    return caught.value.problems


def test_every_mistake_of_structure_is_told_in_a_moment_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "cankd_hf.train", str(tmp_path / "bad.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 2
    heavy = {"torch", "transformers", "torchvision", "datasets", "timm", "accelerate"}
    assert not heavy & set(re.findall(r"^import time:.*\|\s+(\w+)", result.stderr, re.MULTILINE))
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for path, line, message in TOLD:
        assert any(f"error: {path} ({tmp_path}/bad.yaml:{line}): " in told and message in told for told in said), path
    assert len(said) == len(TOLD), said
    # Processor time, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_what_the_source_declares_is_what_the_classes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    live = {name for name in CanKDConfig.__dataclass_fields__ if not name.startswith("_")}
    assert live - training_fields().keys() == {"hub_token", "seed", "output_dir"}
    hints = get_type_hints(CanKDConfig)
    for name, kind in training_fields().items():
        # Enumerations are compared by their values below, and classes of other libraries count as anything.
        plain = str(hints[name]).replace("typing.", "").replace("Any", "")
        if "transformers." not in plain and "accelerate." not in plain and name not in ("fsdp", "ema"):
            assert describe(kind) == describe(hints[name]), name
    values = [member.value for kind in hints["optim"].__args__ if kind is not str for member in kind]
    assert describe(training_fields()["optim"]) == f"one of {', '.join(values)}"
    for name, loss in LOSSES.items():
        found = declared.parameters("cankd_hf.losses", loss.__name__)
        assert found.items() <= get_type_hints(loss.__init__).items() and list(found) == list(
            inspect.signature(loss).parameters
        )
        assert declared.entry_parameters("cankd_hf.losses", "LOSSES", name) == found
    taken = [name for name in inspect.signature(FPNConfig).parameters if name != "kwargs"]
    assert list(declared.parameters(FPNConfig.__module__, "FPNConfig")) == taken
    monkeypatch.setitem(sys.modules, "cankd_hf.tasks", declared)  # a module without the dictionary: the source is read
    assert declared.names("cankd_hf.tasks", "TASKS") == list(TASKS)


class ToyLoss(FeatureLoss):
    """A loss that somebody has in a notebook."""

    def __init__(self, channels: int, power: float = 2.0) -> None:
        super().__init__(channels)
        if power <= 0:
            raise ValueError(f"ToyLoss.power: expected a number above 0, got {power}")
        self.power = power

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().pow(self.power).mean()


def test_what_was_added_at_run_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", SegmentationTask)
    monkeypatch.setitem(LOSSES, "toy", ToyLoss)
    one = "distill.terms=[{loss: toy, teacher: sam, options: {%s}}]"
    recipe = parse_recipe(TAUGHT, ["task=toy", one % "power: 3"])
    assert (recipe.task, recipe.distill.terms[0].options) == ("toy", {"power": 3})
    assert "unknown key; did you mean 'power'?" in problems(TAUGHT, one % "powr: 3")[0]
    (problem,) = problems(TAUGHT, one % "power: -1")
    assert problem == "distill.terms.0.options (command line): ToyLoss.power: expected a number above 0, got -1"


def test_what_models_refuse_is_told_after_the_structure_and_all_at_once() -> None:
    text = "output_dir: out\ndata: {path: shapes}\nstudent:\n  backbone: {model_type: resnett}\n  fpn: {head: x}\n"
    text += "teachers:\n  a:\n    config: {model_type: resnet, depth: [1]}\n    fit: {backbone_lr_scale: 0}\n"
    text += "training:\n  lr_drops: [2]\n"
    assert [problem.partition(": ")[0] for problem in problems(text, "distill.terms.0.options.hidden_channels=0")] == [
        "student.backbone.model_type (x.yaml:4)",
        "teachers.a.config.depth (x.yaml:8)",
        "student.fpn (x.yaml:5)",
        "distill.terms.0.options (command line)",
        "training.lr_drops (x.yaml:11)",
        "teachers.a.fit.backbone_lr_scale (x.yaml:9)",
    ]
    assert problems(text, "seed=-1") == [
        "seed (command line): expected a whole number from 0 to 4294967295, got -1; see docs/recipes.md"
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distill.terms=[{teacher: dino}]", "teacher.model=a"], "got both"),
        (["distill.terms=[{teacher: dinno}]"], "expected one of dino, sam, got 'dinno'; did you mean 'dino'?"),
        (["distill.terms=[{teacher: 3}]"], 'expected text or null, got 3; write it in quotes: "3"'),
        ([], "distill.terms.0.teacher (x.yaml): missing; name the teacher to learn from: dino or sam"),
        (
            ["distill.terms=[{teacher: sam}]", "teachers.1st.model=a"],
            "expected a letter or _, then letters, digits, _ and -",
        ),
        (["teachers.sam.model=null"], "teachers.sam (x.yaml:8): expected exactly one of model and config"),
        (["teachers.sam.modle=a"], "teachers.sam.modle (command line): unknown key; did you mean 'model'?"),
        (["teachers.sam.fit.max_step=1"], "teachers.sam.fit.max_step (command line): unknown key; did you mean"),
        (["teachers.sam=a"], "write it as teachers.sam.model: a"),
        (["student.inherit=[neck]"], "expected one teacher to copy ['neck'] from, got 2"),
        (["distill.task_weight=0", "teachers.sam.fit={}"], "teachers.sam.fit (command line): fits the teacher"),
        (["distill.task_weight=0", "baseline=true"], "a student alone learns nothing"),
    ],
)
def test_several_teachers(overrides: list[str], said: str) -> None:
    found = problems(TAUGHT, *overrides)
    assert any(said in problem for problem in found), found


def test_a_teacher_that_is_null_is_left_out_with_its_terms() -> None:
    both = "distill.terms=[{teacher: dino}, {teacher: sam, name: other}]"
    own = "{name: one, share: 0.5, distill: {terms: [{teacher: sam}, {teacher: dino}]}}"
    for words in ([both], [both, f"phases=[{own}, {{name: two, share: 0.5}}]"]):
        recipe = parse_recipe(TAUGHT, [*words, "teachers.sam=null"])
        assert list(recipe.named_teachers()) == list(recipe.teachers or {}) == ["dino"]
        assert [term.teacher for term in terms_of(recipe)] == ["dino"] * (2 if recipe.phases else 1)
        assert parse_recipe(recipe_to_yaml(recipe)) == recipe
        none = parse_recipe(TAUGHT, [*words, "teachers.sam=null", "teachers.dino=null"])
        assert none == parse_recipe(TAUGHT, [*words, "teachers=null"])
    for words, said in (
        ([both, "teachers.smm=null"], "teachers.smm (command line): null leaves out a teacher"),
        (["distill.terms=[{teacher: dino}]", "teachers.sam=null"], "terms that name it, and none does; known: dino"),
        (["distill.terms=[{teacher: dino}, {teacher: sma}]", "teachers.sam=null"], "expected one of dino, got 'sma'"),
    ):
        found = problems(TAUGHT, *words)
        assert any(said in problem for problem in found), found


def test_teachers_by_name() -> None:
    recipe = parse_recipe(TAUGHT, ["distill.terms=[{teacher: sam, name: a}, {teacher: dino, name: b}]"])
    assert {name: teacher.model for name, teacher in recipe.named_teachers().items()} == {
        "dino": "some/teacher",
        "sam": "other/teacher",
    }
    one = parse_recipe(
        SMALL + "teacher: {model: a}\nstudent.inherit: [neck]\n".replace("student.inherit: [neck]\n", "")
    )
    assert list(one.named_teachers()) == ["teacher"] and one.distill.terms[0].teacher is None
    assert parse_recipe(TAUGHT, ["teachers={dino: {model: a}}", "student.inherit=[neck]"]).student.inherit == ["neck"]
    for none in ("teachers=null", "teachers={}"):
        alone = parse_recipe(TAUGHT + "baseline: true\ndistill: {terms: [{teacher: sam}]}\n", [none])
        assert (alone.named_teachers(), alone.distill.terms, alone.baseline) == ({}, [], False)


def test_checking_a_recipe_does_not_edit_it() -> None:
    recipe, _ = read_recipe(SMALL + "baseline: true\ndistill: {terms: [{weight: 3}]}\n")
    assert recipe.baseline and recipe.distill.terms[0].weight == 3
    assert recipe.resolved().distill.terms == [] and recipe.distill.terms


def test_mistakes_of_one_section_hide_none_of_another_and_none_beside_them() -> None:
    text = "output_dir: ???\ndata: shapes\nstudent: {model: 3, fpn: {a: 1}}\nteacher: {dtype: int8, scale: 0}\n"
    text += "distill: {task_weight: 0, terms: [cankd, {weight: [], warmup: .nan}, {weight: a, name: b}, {name: b}]}\n"
    assert sorted(problem.partition(" (")[0] for problem in problems(text, "seed", "hub.token=x")) == sorted(
        [
            "command line: expected section.key=value, got 'seed'; for example training.max_steps=100",
            "output_dir",
            "data",
            "student.model",
            "student.fpn",
            "teacher",
            "teacher.dtype",
            "teacher.scale",
            "distill.terms.0",
            "distill.terms.1.weight",
            "distill.terms.1.warmup",
            "distill.terms.2.weight",
            "distill.terms.3",
            "hub.token",
        ]
    )


def test_values_of_training_keep_their_types() -> None:
    text = (
        SMALL
        + "training: {logging_steps: 20, learning_rate: 5e-4, max_steps: 3, eval_strategy: no, lr_drops: [0.5]}\n"
    )
    training = parse_recipe(text).training
    assert [type(value) for value in training.values()] == [int, float, int, str, list]


def test_sections_made_in_python_are_checked_too() -> None:
    LossTerm(loss=ToyLoss, options={"power": 3}).check()
    LossTerm(loss=nn.L1Loss(), pairs=[(0, 1)]).check()
    DataConfig(path=Path("x"), image_size=(4, 6)).check_values()  # type: ignore[arg-type]
    StudentConfig(config={"model_type": "resnet", "id2label": {0: "a"}}).check()
    with pytest.raises(InputError) as caught:
        DataConfig(scale=[2.0, 1.0], max_train_samples=-5).check_values()
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "data.max_train_samples: expected a whole number of at least 1 or null, got -5",
        "data.path: expected a folder, a parquet file, a Hub id or `shapes`, got null",
        "data.scale: expected [smallest, largest], got [2.0, 1.0]",
    ]
    with pytest.raises(InputError, match=r"terms\.mine\.options\.afinity: unknown key; did you mean 'affinity'\?"):
        LossTerm(name="mine", options={"afinity": "gaussian"}).check()


def test_what_the_docs_call_the_types() -> None:
    hints: dict[str, Any] = get_type_hints(LossTerm, include_extras=True)
    assert describe(hints["loss"]) == "text"
    assert describe(hints["pairs"]) == "auto or a list of [student level, teacher level]"
    assert describe(get_type_hints(DistillConfig)["grid"]) == "one of finer, coarser, student, teacher"


def test_the_old_place_of_the_arguments() -> None:
    from cankd_hf.config import CanKDConfig as moved

    assert moved is CanKDConfig


def test_a_problem_knows_its_place_and_survives_a_process() -> None:
    problem = pickle.loads(pickle.dumps(Problem("data.path", "expected a folder")))
    assert (problem, problem.path, problem.message) == (
        "data.path: expected a folder",
        "data.path",
        "expected a folder",
    )
