"""Tuning of an arm on a part of the training split: the trials, and the data they are given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cankd_hf.compare.arms import Arm
from cankd_hf.compare.settings import ComparisonConfig, TuningConfig
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm, Share
from cankd_hf.config.parts import spanning, with_terms
from cankd_hf.config.recipe import LEARNING_RATE, Recipe
from cankd_hf.data.common.folders import SPLIT_NAMES, slice_of, split_terms
from cankd_hf.data.common.sources import settled
from cankd_hf.errors import InputError
from cankd_hf.tasks import TASKS


@dataclass(frozen=True)
class Trial:
    """Settings that a trial tries: the learning rate, and a factor of the weights of the terms."""

    learning_rate: float
    weight: float = 1.0

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings."""
        recipe = with_terms(recipe, self._weighted)
        factor = self.learning_rate / recipe.training.get("learning_rate", LEARNING_RATE)
        phases = recipe.phases
        if phases is not None:  # those with a rate of their own keep its ratio to that of the recipe
            rates = [{k: v * factor for k, v in phase.training.items() if k == "learning_rate"} for phase in phases]
            phases = [
                replace(phase, training={**phase.training, **rate}) for phase, rate in zip(phases, rates, strict=True)
            ]
        return replace(recipe, training={**recipe.training, "learning_rate": self.learning_rate}, phases=phases)

    def _weighted(self, terms: list[LossTerm]) -> list[LossTerm]:
        return [replace(term, weight=_times(term.weight, self.weight)) for term in terms]


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

    Images without labels are left out too where trials are scored on them.

    Raises:
        InputError: where the training split is a stream, which cannot be cut in two, or is also a split that is
            scored in the end, which trials must not see; or where nothing says which images without labels to leave
            out.
    """
    if data.streaming:
        raise InputError("tuning: a stream cannot be cut in two; set data.streaming: false under `recipe:`")
    check_apart(data)
    if tuning.eval_split is not None:
        return _apart_from(data, tuning.eval_split, _left_out(data, tuning.eval_split, tuning.left_out))
    part = round(100 * tuning.share)
    train, scored = f"{data.train_split}[{part}%:@{tuning.seed}]", f"{data.train_split}[:{part}%@{tuning.seed}]"
    more = data.unlabelled_split
    if _shared(data):
        if more not in ("auto", data.train_split) or "[" in data.train_split:
            raise InputError(
                f"tuning: data.unlabelled holds images of {scored}, which trials are scored on, and a random part of "
                "a part cannot be left out of it; name tuning.eval_split, such as train[:20%]"
            )
        more = train
    return replace(data, train_split=train, eval_split=scored, test_split=None, unlabelled_split=more)


def _apart_from(data: DataConfig, scored: str, left_out: str | None) -> DataConfig:
    """The data scored on a split that is named, training without the images that are left out."""
    train, more = data.train_split, data.unlabelled_split
    if left_out is not None:
        train = _without(train, left_out)
        if _shared(data):
            more = _without(split_terms(train)[0] if more == "auto" else more, left_out)
    return replace(data, train_split=train, eval_split=scored, test_split=None, unlabelled_split=more)


def _shared(data: DataConfig) -> bool:
    """Whether images without labels are those of the training split; they are numbered alike then."""
    same = data.unlabelled is not None and data.unlabelled == data.path
    return same and (data.unlabelled_split == "auto" or _meaning(data.unlabelled_split) == _meaning(data.train_split))


def _without(split: str, left_out: str) -> str:
    """A split without a part of it."""
    name, terms = split_terms(left_out)
    if any(sign == "-" for sign, _ in terms):
        raise InputError(f"tuning.left_out: expected parts of {name} that are added, got {left_out}; drop the -")
    return "".join([split, *(f"-{split_terms(split)[0]}{brackets}" for _, brackets in terms)])


def _left_out(data: DataConfig, scored: str, left_out: str | None) -> str | None:
    """What trials leave out of the training split.

    Raises:
        InputError: where they would be scored on what is scored in the end, or on what they are trained on.
    """
    train, final = _meaning(data.train_split), data.eval_split if data.test_split is None else data.test_split
    if final is not None and (_overlap(scored, final) or _meaning(scored) == _meaning(final) != train):
        raise InputError(f"tuning.eval_split: {scored} is scored in the end, and trials must not see it; name another")
    if left_out is not None and _meaning(left_out) != train:
        raise InputError(f"tuning.left_out: expected a part of {train}, got {left_out}; name what trials do not see")
    if _meaning(scored) != train:
        return left_out
    left_out = left_out or scored
    for size in (100, 1009, 10_000):
        if {*slice_of(scored, size)[1]} - {*slice_of(left_out, size)[1]}:
            raise InputError(f"tuning.left_out: {left_out} does not hold all of {scored}; leave those out too")
    return left_out


def check_apart(data: DataConfig) -> None:
    """Raises InputError where the split of the final scores is also trained on."""
    final = "test_split" if data.test_split is not None else "eval_split"
    scored = getattr(data, final)
    if scored is not None and _overlap(scored, data.train_split):
        what = "the training split" if "[" not in scored else f"also in the training split {data.train_split}"
        raise InputError(f"data.{final}: {scored} is {what}; name another one to score")


def _overlap(one: str, other: str) -> bool:
    """Whether two splits may have images in common; percent and numbers are compared for sets of three sizes."""
    sizes = (100, 1009, 10_000)
    return _meaning(one) == _meaning(other) and any(
        not {*slice_of(one, size)[1]}.isdisjoint(slice_of(other, size)[1]) for size in sizes
    )


def _meaning(split: str) -> str:
    name = split_terms(split)[0].strip()
    return SPLIT_NAMES.get(name.lower(), name)


def trial_recipe(config: ComparisonConfig, arm: Arm, trial: Trial) -> Recipe:
    """The recipe of one trial of an arm."""
    tuning = config.tuning
    assert tuning is not None
    for phase in arm.recipe.phases or ():
        if "train_split" in phase.data and "path" not in phase.data:
            raise InputError(
                f"tuning: phase {phase.name} of {arm.name} has a data.train_split of its own; leave it out"
            )
    steps = tuning.steps or next((one.steps for one in config.budgets if one.steps is not None), None)
    recipe = trial.of(spanning(arm.recipe, steps or arm.recipe.training.get("max_steps", -1)))
    training = {**recipe.training, "eval_strategy": "no", "load_best_model_at_end": False}
    data = recipe.data
    if not data.streaming:  # what is held out of the training images for the final scores is no part of a trial
        data = settled(data, TASKS[recipe.task].open_data(data))
    return replace(recipe, seed=tuning.seed, training=training, data=tuning_data(data, tuning))


def best(trials: Sequence[Trial], scores: Sequence[float | None], greater_is_better: bool) -> Trial | None:
    """The trial with the best score, the first of equal ones; None if no trial has a score."""
    scored = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not scored:
        return None
    sign = -1 if greater_is_better else 1
    return trials[min(scored, key=lambda pair: (sign * pair[0], pair[1]))[1]]
