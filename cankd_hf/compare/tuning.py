"""Tuning of an arm on a part of the training split: the trials, and the data they are given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cankd_hf.compare.arms import Arm, spanning
from cankd_hf.compare.settings import ComparisonConfig, TuningConfig
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import Share
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.folders import SPLIT_NAMES
from cankd_hf.errors import InputError


@dataclass(frozen=True)
class Trial:
    """Settings that a trial tries: the learning rate, and a factor of the weights of the terms."""

    learning_rate: float
    weight: float = 1.0

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings."""
        terms = [replace(term, weight=_times(term.weight, self.weight)) for term in recipe.distill.terms]
        training = {**recipe.training, "learning_rate": self.learning_rate}
        return replace(recipe, training=training, distill=replace(recipe.distill, terms=terms))


def _times(weight: float | list[float] | Share, factor: float) -> float | list[float] | Share:
    """The weight times a factor; of a share the odds, so that it stays below 1."""
    if isinstance(weight, Share):
        odds = factor * weight.share / (1 - weight.share)
        return Share(odds / (1 + odds))
    return [value * factor for value in weight] if isinstance(weight, list) else weight * factor


def trials_of(tuning: TuningConfig, arm: Arm) -> list[Trial]:
    """The trials of an arm, equally many for each: without terms, all of them are learning rates."""
    if arm.distils:
        return [Trial(rate, weight) for rate in tuning.learning_rate for weight in tuning.weight]
    if len(tuning.weight) == 1:
        return [Trial(rate) for rate in tuning.learning_rate]
    low, high = min(tuning.learning_rate), max(tuning.learning_rate)
    if low == high:
        low, high = low / 2, high * 2
    return [Trial(float(f"{rate:.3g}")) for rate in np.geomspace(low, high, tuning.trials)]


def tuning_data(data: DataConfig, tuning: TuningConfig) -> DataConfig:
    """The `data:` section of trials: no test split, and parts of the training split for training and scoring.

    Raises:
        InputError: where the training split is a stream, which cannot be cut in two, or is also a split that is
            scored in the end, which trials must not see.
    """
    if data.streaming:
        raise InputError("tuning: a stream cannot be cut in two; set data.streaming: false under `recipe:`")
    check_apart(data)
    part = round(100 * tuning.share)
    return replace(
        data,
        train_split=f"{data.train_split}[{part}%:@{tuning.seed}]",
        eval_split=f"{data.train_split}[:{part}%@{tuning.seed}]",
        test_split=None,
    )


def check_apart(data: DataConfig) -> None:
    """Raises InputError where the split of the final scores is also trained on."""
    final = "test_split" if data.test_split is not None else "eval_split"
    scored = getattr(data, final)
    if scored is not None and _meaning(scored) == _meaning(data.train_split) and "[" not in scored:
        raise InputError(f"data.{final}: {scored} is the training split; name another one to score")


def _meaning(split: str) -> str:
    name = split.partition("[")[0].strip()
    return SPLIT_NAMES.get(name.lower(), name)


def trial_recipe(config: ComparisonConfig, arm: Arm, trial: Trial) -> Recipe:
    """The recipe of one trial of an arm."""
    tuning = config.tuning
    assert tuning is not None
    steps = tuning.steps or next((one.steps for one in config.budgets if one.steps is not None), None)
    recipe = trial.of(spanning(arm.recipe, steps or arm.recipe.training.get("max_steps", -1)))
    training = {**recipe.training, "eval_strategy": "no", "load_best_model_at_end": False}
    return replace(recipe, seed=tuning.seed, training=training, data=tuning_data(recipe.data, tuning))


def best(trials: Sequence[Trial], scores: Sequence[float | None], greater_is_better: bool) -> Trial | None:
    """The trial with the best score, the first of equal ones; None if no trial has a score."""
    scored = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not scored:
        return None
    sign = -1 if greater_is_better else 1
    return trials[min(scored, key=lambda pair: (sign * pair[0], pair[1]))[1]]
