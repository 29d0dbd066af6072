"""Whatever a recipe or an override holds: a recipe, or messages with places. Counts and command: see `cases`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.runs.recipe import load_recipe, parse_recipe

from .cases import SNIPPETS, edited, edits, result_or_input_error, within

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
TINY = """output_dir: out
seed: 3
data:
  path: shapes
  generated: {train: 8, validation: 4, test: 4, size: 32}
  crop_size: [32, 32]
  scale: [0.5, 2.0]
student:
  backbone: {model_type: resnet, hidden_sizes: [8, 8], depths: [1, 1], layer_type: basic, embedding_size: 8}
  fpn: {fpn_channels: 8}
teacher:
  config:
    model_type: dinov2
    hidden_size: 8
    num_hidden_layers: 1
  taps: auto
distill:
  task_weight: 1
  terms:
    - loss: cankd
      weight: 10
      pairs: [[-1, -1]]
      warmup: 0.1
      options: {affinity: gaussian}
training:
  max_steps: 3
  learning_rate: 5e-4
  per_device_train_batch_size: 2
  eval_strategy: steps
  logging_steps: 1
hub: {id: me/a, tags: [a]}
"""
KEYS = """output_dir|seed|task|data|data.path|data.image_size|data.image_size.0|data.generated.size|data.scale
data.check|student|student.config|student.config.model_type|student.fpn.fpn_channels|student.taps|teacher|teachers.a.model
teacher.fit|teacher.fit.max_steps|distill.terms|distill.terms.0|distill.terms[0].pairs|distill.terms.0.options.affinity|baseline
distill.terms.7.weight|distill.terms[999999999999].loss|training.max_steps|training.learning_rate|training.save_steps
training.fsdp_config|training.lr_scheduler_kwargs|training.report_to|training.lr_drops|hub|hub.tags.0|a..b|.|..||[0]|a[0]
a[|é.ü|²|data.²|1|null|<<|training.lr_drops[²]|output_dir.x.y|data.path.x""".replace("\n", "|").split("|")

for _text in (TINY, *TEXTS):  # imports torch and the configurations of models, which no case should pay for
    parse_recipe(_text, ["data.path=shapes"])


def checked(recipe: Recipe | None) -> None:
    """A recipe that was accepted is saved and read again as it is."""
    if recipe is not None:
        assert parse_recipe(recipe_to_yaml(recipe)) == recipe


@within(250)
@given(st.sampled_from([TINY] * 8 + TEXTS), edits)
def test_edited_recipes(text: str, changes: list[tuple[str, float, str]]) -> None:
    checked(result_or_input_error(lambda: parse_recipe(edited(text, changes), ["output_dir=out"], "x.yaml")))


@within(200)
@given(
    st.lists(
        st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(SNIPPETS)) | st.text(max_size=20), max_size=4
    )
)
def test_overrides(overrides: list[str]) -> None:
    checked(result_or_input_error(lambda: parse_recipe(TINY, overrides, "x.yaml")))


@within(100)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-16"))
    | st.text(max_size=60).map(str.encode)
)
def test_files_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    checked(result_or_input_error(lambda: load_recipe(file)))


def test_the_fuzzers_fail_on_what_they_are_for() -> None:
    for wrong in (lambda: [1][int("1")], lambda: {}["a"], lambda: int("9" * 5000)):
        with pytest.raises((LookupError, ValueError)):
            result_or_input_error(wrong)
