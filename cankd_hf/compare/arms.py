"""The arms of a comparison as recipes, with the controls that a verdict needs and the teachers to train first."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cankd_hf.compare.records import Records
from cankd_hf.compare.settings import ComparisonConfig, as_overrides
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import DistillConfig, LossTerm
from cankd_hf.config.parts import spanning, terms_of, with_terms
from cankd_hf.config.places import missing_places
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.data.common.sources import labelled_by_people
from cankd_hf.errors import InputError, together
from cankd_hf.runs import adapting
from cankd_hf.runs.recipe import load_recipe

REFERENCE, NO_BLOCK, UNTRAINED, TWIN = "reference", "no block", "untrained teacher", "twin"
ALONE, INSTANCE_MSE = "alone", "instance_mse"
_WITH_BLOCK = ("cankd", "static_linear")
# Settings of every run of a comparison; what is sent, shown and kept is not its business.
_EVERY_RUN = {
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "log_figures_steps": 0,
    "prediction_images": 0,
}


@dataclass(frozen=True)
class TeacherRun:
    """A run that trains a teacher; `untrained` ones keep their random weights."""

    key: str
    name: str
    recipe: Recipe


@dataclass
class Arm:
    """One arm.

    Attributes:
        name: in tables.
        recipe: with everything but seed and steps.
        control: what it is a control of, or "".
        follows: the arm whose steps and tuned settings it has; "" for one with its own.
        teachers: runs that must have ended before.
    """

    name: str
    recipe: Recipe
    control: str = ""
    follows: str = ""
    teachers: tuple[TeacherRun, ...] = ()

    @property
    def distils(self) -> bool:
        """Whether it learns from a teacher."""
        return bool(self.recipe.named_teachers()) and any(term.counts for term in terms_of(self.recipe))

    def at(self, seed: int, steps: int) -> Recipe:
        """Its recipe with this seed, its schedules spanning this many steps."""
        recipe = spanning(self.recipe, steps)
        if self.control == TWIN:  # the same initial weights, another order and augmentation
            recipe.training["data_seed"] = derived_seed(seed, TWIN) % 2**32
        return replace(recipe, seed=seed)


def build_arms(config: ComparisonConfig, records: Records) -> dict[str, Arm]:
    """The arms of a comparison by name, those of the user first, then the controls of its verdict.

    Raises:
        InputError: with the problems of every arm's recipe, and of controls that cannot be made.
    """
    common = as_overrides(config.recipe)

    def loaded(name: str) -> Recipe:
        try:
            return load_recipe(config.base, [*common, *as_overrides(config.arms[name])])
        except InputError as error:
            raise InputError([f"arms.{name}: {problem}" for problem in error.problems]) from error

    recipes = dict(zip(config.arms, together(*(partial(loaded, name) for name in config.arms)), strict=True))
    recipes = {name: for_comparison(recipe, config.curve) for name, recipe in recipes.items()}
    if config.judged is not None:
        base = for_comparison(load_recipe(config.base, common), config.curve)
        for name, made in _standard_controls(base, recipes).items():
            recipes[name] = made
    if config.teacher is not None and not any(recipe.named_teachers() for recipe in recipes.values()):
        raise InputError("teacher: no arm learns from a teacher; add one to the base recipe, or leave this out")
    arms = {name: _with_teachers(config, records, name, recipe) for name, recipe in recipes.items()}
    _check(config, arms)
    if config.judged is not None:
        _mark_controls(config, arms, _plain(base, recipes))
        for made in together(
            *(partial(_untrained, config, records, arms[name], recipes[name]) for name in untrained_of(config, arms))
        ):
            arms[made.name] = made
        twin = arms[config.judged.twin or reference_of(config, arms)]
        name = _free(f"{twin.name} (twin)", arms)
        arms[name] = replace(twin, name=name, control=TWIN, follows=twin.name)
    return arms


def for_comparison(recipe: Recipe, curve: int) -> Recipe:
    """A recipe as one run of a comparison: no baseline, nothing sent, evaluated for its learning curve.

    Raises:
        InputError: for a recipe with several students, whose runs share their costs.
    """
    if recipe.students:
        raise InputError("students: runs of a comparison have one student; make each an arm (student.backbone=...)")
    training = {**recipe.training, **_EVERY_RUN}
    if curve and recipe.data.eval_split is not None and not training.get("load_best_model_at_end"):
        training |= {"eval_strategy": "steps", "eval_steps": 1.0 / curve}
    return replace(recipe, baseline=False, hub=None, training=training)


def reference_of(config: ComparisonConfig, arms: Mapping[str, Arm]) -> str:
    """The arm that the others are compared with: the named one, else the first that does not distil, else the first
    of all."""
    if config.judged is not None and config.judged.reference is not None:
        return config.judged.reference
    return next((name for name, arm in arms.items() if not arm.distils), next(iter(arms)))


def _standard_controls(base: Recipe, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """No distillation, and the loss without a block, where no arm is that already."""
    alone = replace(base, teacher=None, teachers=None, student=replace(base.student, inherit=[]))
    found = {}
    # without labels a student alone learns nothing
    if base.distill.task_weight and all(terms_of(recipe.resolved()) for recipe in recipes.values()):
        found[_free(ALONE, recipes)] = alone
    plain = _plain(base, recipes)
    if plain is not None and not any(_losses(recipe) == _losses(plain) for recipe in recipes.values()):
        found[_free(INSTANCE_MSE, {**recipes, **found})] = plain
    return found


def _plain(base: Recipe, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """The base recipe, or the first arm that has terms, with the loss without a block in the place of those with one;
    None if nothing distils."""
    source = next((one for one in (base, *recipes.values()) if terms_of(one.resolved())), None)
    return None if source is None else with_terms(source.resolved(), _without_block)


def _without_block(terms: list[LossTerm]) -> list[LossTerm]:
    if not terms:
        return terms
    if not any(term.loss_name in (*_WITH_BLOCK, INSTANCE_MSE) for term in terms):
        terms = [LossTerm(INSTANCE_MSE, weight=terms[0].weight, teacher=terms[0].teacher)]
    elif not any(term.loss_name == INSTANCE_MSE for term in terms):
        terms = [
            replace(term, loss=INSTANCE_MSE, options={}) if term.loss_name in _WITH_BLOCK else term for term in terms
        ]
    return [term for term in terms if term.loss_name not in _WITH_BLOCK]


def _losses(recipe: Recipe) -> list[str]:
    return sorted(term.loss_name for term in terms_of(recipe.resolved()))


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return name if name not in taken else _free(f"{name} (control)", taken)


def _mark_controls(config: ComparisonConfig, arms: dict[str, Arm], plain_recipe: Recipe | None) -> None:
    arms[reference_of(config, arms)].control = REFERENCE
    if plain_recipe is None:
        return
    plain = next((arm for arm in arms.values() if _losses(arm.recipe) == _losses(plain_recipe)), None)
    if plain is not None and not plain.control:
        plain.control = NO_BLOCK


def untrained_of(config: ComparisonConfig, arms: Mapping[str, Arm]) -> list[str]:
    """The arms that are also run with an untrained teacher."""
    assert config.judged is not None
    if config.judged.untrained is not None:
        return config.judged.untrained
    if any(not arm.recipe.distill.task_weight for arm in arms.values()):
        return []  # without labels the score is the likeness to the teacher, which another teacher would change
    own = [name for name, arm in arms.items() if arm.distils and not arm.follows and arm.control != REFERENCE]
    return [name for name in own if arms[name].control != NO_BLOCK] or own


def _check(config: ComparisonConfig, arms: Mapping[str, Arm]) -> None:
    """Raises InputError for arms whose scores cannot be compared, and for what they name and is not there."""
    tasks = {arm.recipe.task for arm in arms.values()}
    if len(tasks) > 1:
        raise InputError(f"arms: expected one task, got {', '.join(sorted(tasks))}; compare each in its own file")
    for name, arm in arms.items():
        data = arm.recipe.data
        if data.test_split is None and data.eval_split is None and arm.recipe.distill.task_weight:
            raise InputError(f"arms.{name}: data.test_split: nothing to score; name a test split under `recipe:`")
        evaluated = str(arm.recipe.training.get("eval_strategy", "no")) != "no"
        if config.screen is not None and data.test_split is not None and not (data.eval_split and evaluated):
            raise InputError(
                f"screen: arms.{name} has no validation scores, by which arms are screened: the test split is not "
                "looked at; name data.eval_split under `recipe:`, and leave `curve` above 0"
            )
        missing = [
            f"arms.{name}: {key}: {message}"
            for key, message in missing_places(arm.recipe)
            if not (arm.teachers and key.startswith("teacher"))  # it is trained first
        ]
        if missing:
            raise InputError(missing)
    if config.images == "labelled":
        _check_labelled(arms)


def _check_labelled(arms: Mapping[str, Arm]) -> None:
    """Raises InputError for an arm that sees other labels of people than the first one."""
    first: tuple[str, set[str]] | None = None
    for name, arm in arms.items():
        own = labelled_by_people(arm.recipe.data)
        if first is None:
            first = name, own
        elif own != first[1]:
            raise InputError(
                f"arms.{name}: data.train_split: expected the {len(first[1])} images with labels of people that "
                f"{first[0]} has, got {len(own)} ({len(own ^ first[1])} differ); arms may differ in those that a "
                "teacher labelled (`cankd label`) alone"
            )


def _folder(records: Records, key: str) -> str:
    return str(records.runs / key)


def _teacher_run(records: Records, name: str, recipe: Recipe, untrained: bool = False) -> TeacherRun:
    if untrained:  # one step that moves nothing: the same seed, data and files, but no training
        recipe = replace(recipe, student=_random_student(recipe.student))
        schedule = ("lr_scheduler_type", "lr_scheduler_kwargs", "lr_drops", "warmup_steps")
        training = {key: value for key, value in recipe.training.items() if key not in schedule}
        training |= {"lr_scheduler_type": "constant", "max_steps": 1, "learning_rate": 0.0}
        training |= {"eval_strategy": "no", "load_best_model_at_end": False}
        recipe, name = replace(recipe, training=training), f"untrained {name}"
    return TeacherRun(records.key(recipe), name, recipe)


def _with_teachers(
    config: ComparisonConfig, records: Records, name: str, recipe: Recipe, untrained: bool = False
) -> Arm:
    """The arm with each of its teachers loaded from the folder of the run that trains it, where one does."""
    configs, runs = recipe.named_teachers(), []
    made: dict[str, TeacherConfig] = {}
    for teacher, given in configs.items():
        source = _source(config, recipe, given)
        if source is None:
            made[teacher] = _random(given) if untrained else given
            continue
        run = _teacher_run(records, teacher, source, untrained)
        runs.append(run)
        made[teacher] = given.fitted(_folder(records, run.key))
    return Arm(name, recipe.with_teachers(made), teachers=tuple(runs))


def _source(config: ComparisonConfig, recipe: Recipe, given: TeacherConfig) -> Recipe | None:
    """The recipe that trains a teacher of an arm; None for one that is trained already."""
    if config.teacher is not None:
        data = [item for item in as_overrides(config.recipe) if item.startswith("data.")]
        return for_comparison(load_recipe(config.teacher, data), 0)
    if given.fit is None:
        return None
    if given.adapt is not None and given.adapt.tune == "lora":
        raise InputError(
            "teacher.adapt.tune: lora is for a run of its own, got it in a comparison; run the recipe once, and name "
            "the teacher that it leaves (OUTPUT_DIR/teacher) as teacher.model, with teacher.adapt: null"
        )
    student = adapting.untrained(given)
    training = {**recipe.training, "ema": None, "eval_strategy": "no", **given.fit}
    # What is for students alone must not make a teacher of its own for an arm.
    students = {key: value for key, value in vars(DataConfig()).items() if key.startswith(("unlabelled", "strong"))}
    images = {key: value for key, value in recipe.data.generated.items() if key != "unlabelled"}
    return replace(
        recipe,
        data=replace(recipe.data, **students, generated=images),
        student=student,
        teacher=None,
        teachers=None,
        distill=DistillConfig(terms=[], frozen=adapting.frozen(given.adapt)),
        phases=None,
        training=training,
    )


def _random(given: TeacherConfig) -> TeacherConfig:
    """The teacher with random weights of the seed in place of its own."""
    if given.config is not None:
        return given  # it never had others
    name = str(given.model)
    from cankd_hf.features.inputs import image_stats, is_timm_name

    if given.from_torchvision or is_timm_name(name):
        raise InputError(
            f"verdict.untrained: {name} cannot be built with random weights; name arms with other teachers there"
        )
    settings = _settings_of(name, given.revision, given.trust_remote_code)
    stats = image_stats(name, given.revision)
    mean, std = given.image_mean or list(stats.mean), given.image_std or list(stats.std)
    return replace(given, model=None, config=settings, revision=None, image_mean=mean, image_std=std)


def _random_student(given: StudentConfig) -> StudentConfig:
    """The same model with random weights of the seed in every part."""
    from cankd_hf.models.backbones import backbone_config

    hub: dict[str, Any] = {"revision": given.revision, "trust_remote_code": given.trust_remote_code}
    config, backbone = given.config, given.backbone
    if given.model is not None:
        config = _settings_of(given.model, given.revision, given.trust_remote_code)
        for key in ("id2label", "label2id", "semantic_loss_ignore_index"):  # the data decide them
            config.pop(key, None)
    if isinstance(backbone, str) or (isinstance(backbone, dict) and "pretrained" in backbone):
        backbone = _plain_settings(backbone_config(backbone, **hub))
    inner = (config or {}).get("backbone_config")
    if isinstance(inner, dict) and "pretrained" in inner:
        config = {**(config or {}), "backbone_config": _plain_settings(backbone_config(inner, **hub))}
    return replace(given, model=None, config=config, backbone=backbone, revision=None)


def _settings_of(name: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The fields of a model's configuration."""
    from cankd_hf.models import register
    from cankd_hf.models.backbones import load_config

    register()
    return _plain_settings(load_config(name, {"revision": revision, "trust_remote_code": trust_remote_code}))


def _plain_settings(found: Any) -> dict[str, Any]:
    settings = copy.deepcopy(found.to_diff_dict()) | {"model_type": found.model_type}
    for key in ("transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path", "architectures"):
        settings.pop(key, None)
    return settings


def _untrained(config: ComparisonConfig, records: Records, arm: Arm, recipe: Recipe) -> Arm:
    if not arm.distils:
        raise InputError(f"verdict.untrained: {arm.name} learns from no teacher; leave it out")
    made = _with_teachers(config, records, f"{arm.name} (untrained teacher)", recipe, untrained=True)
    return replace(made, control=UNTRAINED, follows=arm.name)
