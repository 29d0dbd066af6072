"""Data sets from a `data:` section: folder, parquet, Hub, stream or generated."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.checks import Report, preflight
from cankd_hf.data.common.dataset import AnySource, ImageDataset, Sources, StreamSource, Transform
from cankd_hf.data.common.folders import FolderSource, slice_of, split_terms, usual_split
from cankd_hf.data.common.holdout import lacking, with_held_out
from cankd_hf.data.common.leaks import refuse_leaks
from cankd_hf.data.common.opening import Generated, SplitCatalog, open_set, without_meaning
from cankd_hf.data.common.pseudo import PseudoLabels, labelled_by_teacher, read_pseudo_labels
from cankd_hf.data.common.streams import StreamDataset
from cankd_hf.data.common.strong import strongly
from cankd_hf.data.common.tables import TableSource
from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)
UNLABELLED_SPLITS = ("unlabelled", "unlabeled", "unsupervised")
ROLES = ("train", "eval", "test")
UNLABELLED = "unlabelled"  # the role of images that only a teacher labels
ROWS = "rows"  # as `data.unlabelled`: the images of the training split that have no label


@dataclass
class TaskData:
    """The splits of one data set, ready for the Trainer."""

    train: Any  # items with `pixel_values` [3, h, w] and, with labels, `labels`; augmented
    eval: Any  # the same at `image_size`, for scoring; None without such a split
    test: Any  # the same for the final table
    # plain data for reports and cards: source, splits, skipped, warnings, class names
    facts: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None  # samples -> one batch
    probe: Any = None  # held-out images with labels, of a run that reads none
    unlabelled: Any = None  # images without labels beside `train`, for the teachers


def find_split(wanted: str, names: Sequence[str]) -> str | None:
    """The split of this name (its slice ignored), or one with an equivalent name such as `val` and `validation`."""
    name = slice_of(wanted, 0)[0]
    if name in names:
        return name
    return next((other for other in names if usual_split(other) == usual_split(name)), None)


def split_of(config: DataConfig, role: str) -> str | None:
    """The split that the recipe names for a role."""
    return {"train": config.train_split, "eval": config.eval_split, "test": config.test_split}[role]


def by_role(
    config: DataConfig, catalog: SplitCatalog, roles: Sequence[str]
) -> dict[str, tuple[AnySource, Sequence[int]]]:
    """Source and indices of each role's split. Raises InputError with the problems of all splits."""
    names = catalog.names()
    result: dict[str, tuple[AnySource, Sequence[int]]] = {}
    problems = []
    config = settled(config, catalog)
    for role in roles:
        wanted = split_of(config, role)
        if wanted is None:
            if len(roles) == 1:
                problems.append(f"data.{role}_split: expected a split of {config.path}, which has {names}; got none")
            continue
        name = find_split(wanted, names)
        if name is None:
            hint = "; set it to null to go without" if role != "train" else ""
            if hint and config.streaming:
                hint += ", or drop data.streaming: no part of a stream can be held out"
            listed = ", ".join(names)
            problems.append(f"data.{role}_split: expected a split of {config.path} ({listed}), got {wanted!r}{hint}")
            continue
        try:
            source = catalog.source(name)
        except InputError as error:
            problems += error.problems
            continue
        if isinstance(source, StreamSource):
            problems += _cut(f"data.{role}_split", wanted)
            result[role] = (source, range(0))
            continue
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        indices = slice_of(wanted, len(source))[1][:limit]
        if not len(indices):
            problems.append(f"data.{role}_split: expected at least 1 image in {wanted!r} of {config.path}, got none")
        result[role] = (source, indices)
    if "train" in roles and config.unlabelled is not None:
        try:
            result[UNLABELLED] = _unlabelled(config, catalog, result.get("train"))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems))
    return result


def settled(config: DataConfig, catalog: SplitCatalog) -> DataConfig:
    """The same section with parts of the training images for standard splits that the set lacks, which is told."""
    names = catalog.names()
    roles, untested = lacking(config, names)
    if untested:
        catalog.warnings.append(f"no test split in {config.path}: the validation split is scored")
        return replace(config, test_split=None)
    if not roles:
        return config
    name = find_split(config.train_split, names)
    source = None if name is None else catalog.source(name)
    if source is None or isinstance(source, StreamSource):
        return config
    size = len(slice_of(config.train_split, len(source))[1])
    if size <= len(roles):  # nothing to cut: the split is missing, which is told below
        return config
    named = list(source.rows.names) if isinstance(source, FolderSource) and size == len(source) else ()
    config, said = with_held_out(config, size, roles, str(config.path), named)
    catalog.warnings += said
    return config


def _pictures(config: DataConfig, roles: Sequence[str]) -> Sources:
    """The splits without labels, in an order that can be asked for again."""
    plain = replace(config, streaming=False)
    return by_role(replace(plain, unlabelled=None), open_set(plain, need_masks=False), roles)


def labelled_by_people(config: DataConfig) -> set[str]:
    """Names of the training images whose labels are no teacher's.

    Raises:
        InputError: for a set that cannot be opened.
    """
    source, indices = _pictures(config, ["train"])["train"]
    assert not isinstance(source, StreamSource)
    return {source.name(index) for index in indices} - labelled_by_teacher(config)


def _unlabelled(
    config: DataConfig, labelled: SplitCatalog, train: tuple[AnySource, Sequence[int]] | None
) -> tuple[AnySource, Sequence[int]]:
    """Source and indices of the images at `data.unlabelled`."""
    place = f"data.{UNLABELLED}"
    if config.unlabelled == ROWS:
        if train is None or not isinstance(train[0], FolderSource | TableSource):
            raise InputError(f"{place}: {ROWS} are those of a folder or a table, read at once; name another set")
        alone, bare = train[0].without_labels()
        chosen = sorted({*bare} & {*train[1]})
        if not chosen:
            raise InputError(f"{place}: expected images without a label in {config.path}, got none; name another set")
        return alone, chosen
    same = config.unlabelled == config.path
    settings = replace(
        config,
        path=config.unlabelled,
        name=config.name if same else None,
        revision=config.revision if same else None,
        image_column=config.image_column if same else "auto",
        streaming=config.streaming or config.unlabelled_streaming,
        labels=None,
    )
    wanted = config.unlabelled_split
    if same and find_split(wanted, labelled.names()) is not None and not settings.streaming:
        # numbered as the labelled images are, so that two parts of one split do not overlap
        source = labelled.source(str(find_split(wanted, labelled.names())))
        if isinstance(source, FolderSource | TableSource):
            return source.alone(), slice_of(wanted, len(source))[1]
    try:
        catalog = open_set(settings, need_masks=False)
    except InputError as error:
        raise InputError([problem.replace("data.path", place, 1) for problem in error.problems]) from error
    names = catalog.names()
    if wanted == "auto":
        wanted = next((name for name in names if name in UNLABELLED_SPLITS), names[0] if len(names) == 1 else "train")
    name = find_split(wanted, names)
    if name is None:
        listed = ", ".join(names)
        raise InputError(f"{place}_split: expected a split of {config.unlabelled} ({listed}), got {wanted!r}")
    source = catalog.source(name)
    if isinstance(source, StreamSource):
        if problems := _cut(f"{place}_split", wanted):
            raise InputError(problems)
        return source, range(0)
    return source, slice_of(wanted, len(source))[1]


def _cut(place: str, wanted: str) -> list[str]:
    """The problem of a part of a stream, whose images have no numbers."""
    name, terms = split_terms(wanted)
    if not any(brackets for _, brackets in terms):
        return []
    return [
        f"{place}: expected a whole split, as no part of a stream can be taken, got {wanted!r}; name {name}, or "
        "drop streaming"
    ]


def wrap(
    config: DataConfig,
    catalog: SplitCatalog,
    sources: Sources,
    labelled: bool,
    seed: int,
    augment: Transform,
    evaluate: Transform,
) -> TaskData:
    """Check the sources (from `by_role`) and apply the transforms: `augment` for training, else `evaluate`.

    `labelled` says whether labels are needed, `seed` is for the shuffle of a stream. Raises InputError like
    `preflight`.
    """
    names = list(catalog.labels.id2label.values())
    if UNLABELLED in sources and config.check != "none":
        refuse_leaks(sources[UNLABELLED], {role: sources[role] for role in ("eval", "test") if role in sources})
    report = preflight(config, sources, catalog.labels.id2label if labelled else None)
    pseudo = PseudoLabels()
    if labelled and "train" in sources:
        pseudo = read_pseudo_labels(config, lambda: _pictures(config, [role for role in sources if role in ROLES]))
    told = [*catalog.warnings, *_without_unlabelled(config), *pseudo.notices]
    noticed = list(dict.fromkeys(told))  # two slices of one split give the same warnings
    for warning in noticed:
        logger.warning("data: %s", warning)
    transforms = _transforms(config, sources, augment, evaluate)
    loaded = {role: _dataset(config, role, sources[role][0], transforms[role], report, seed) for role in sources}
    sizes = {role: len(dataset) if isinstance(dataset, ImageDataset) else None for role, dataset in loaded.items()}
    facts: dict[str, Any] = {
        "source": config.path,
        "revision": config.revision,
        "streaming": config.streaming and not isinstance(catalog, Generated),
        "classes": names,
        "splits": {role: sizes[role] for role in ROLES if role in sizes},
        "checked": report.checked,
        "skipped": {"count": len(report.skipped), "files": report.skipped},
        "warnings": noticed + report.warnings,
    }
    if pseudo.cost:
        facts["prepaid"] = {"pseudo-labels": pseudo.cost}
    if UNLABELLED in sizes:
        facts[UNLABELLED] = {
            "source": config.unlabelled,
            "images": sizes[UNLABELLED],
            "ratio": config.unlabelled_ratio,
        }
    names_of = dict.fromkeys([*report.dropped, *report.empty])
    left_out = {name: report.dropped.get(name, []) + report.empty.get(name, []) for name in names_of}
    if left_out:
        facts["dropped"] = {"count": sum(map(len, left_out.values())), "files": left_out}
    train, scored, test = (loaded.get(role) for role in ROLES)
    return TaskData(train, scored, test, facts, unlabelled=loaded.get(UNLABELLED))


def _without_unlabelled(config: DataConfig) -> list[str]:
    """A warning that names settings of images without labels that have no effect, if any."""
    ignored = {None: ("split", "streaming", "ratio"), ROWS: ("split", "streaming"), "shapes": ("streaming",)}
    names = [f"{UNLABELLED}_{name}" for name in ignored.get(config.unlabelled, ())]
    return without_meaning(config, *names, where=f"data.unlabelled: {config.unlabelled or 'null'}")


def _transforms(config: DataConfig, sources: Sources, augment: Transform, evaluate: Transform) -> dict[str, Transform]:
    """The transform of each role; that of images whose student's picture is augmented strongly gives two."""
    strong = {"unlabelled": {UNLABELLED}, "all": {UNLABELLED, "train"}, "none": set()}[config.strong.images]
    made = strongly(augment, config) if strong & sources.keys() else augment
    return {
        role: made if role in strong else augment if role in ("train", UNLABELLED) else evaluate for role in sources
    }


def _dataset(
    config: DataConfig, role: str, source: AnySource, transform: Transform, report: Report, seed: int
) -> ImageDataset | StreamDataset:
    """The samples of one role."""
    if isinstance(source, StreamSource):
        limit = {"train": config.max_train_samples, UNLABELLED: None}.get(role, config.max_eval_samples)
        shuffle = config.shuffle_buffer if role in ("train", UNLABELLED) else 0
        return StreamDataset(source, transform, shuffle, limit, config.on_error, seed)
    images = ImageDataset(source, transform, report.usable[role], config.cache, config.on_error)
    images.extremes = [images.indices.index(index) for index in report.extremes.get(role, [])]
    return images
