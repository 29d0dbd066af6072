"""Checks images and labels before training, so that nothing breaks hours into a run."""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import AnySource, Known, Source, Sources, StreamSource
from cankd_hf.data.common.decode import Unlabelled, Unusable, WrongLabels
from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.common.hashes import picture_hash
from cankd_hf.data.common.leaks import refuse_unlabelled
from cankd_hf.data.common.progress import told
from cankd_hf.data.common.targets import Summary
from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Result of the checks."""

    usable: dict[str, list[int]] = field(default_factory=dict)  # role -> indices of its source to use
    skipped: dict[str, str] = field(default_factory=dict)  # file -> reason
    warnings: list[str] = field(default_factory=list)  # notes that do not stop a run
    checked: int = 0  # number of images checked
    # role -> indices of the images with the shortest side and of the longest shape, which a model may not take
    extremes: dict[str, list[int]] = field(default_factory=dict)
    # file -> the parts of its label that are left out, and why
    dropped: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)  # the same for parts without content


@dataclass
class _Finding:
    """Result of checking one image: a digest of its pixels, a summary of its label, and what is wrong with it."""

    role: str
    index: int
    name: str
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    label: Summary | None = None
    problem: str = ""
    fatal: bool = False
    bare: bool = False  # it has no label, which is no fault of it
    decoded: bool = True


def preflight(config: DataConfig, sources: Sources, class_names: dict[int, str] | None) -> Report:
    """Decode images and labels as training will, and report all problems at once.

    How many are decoded is `config.check`; a number of them is spread evenly over each split, the same in each run. To
    them come as many of those whose boxes do not fit the stated size. Of the other images in folders only the files
    are looked for, unless `config.check` is `none`. Without `class_names`
    only images are needed. Raises InputError naming the files that cannot be used; with `on_error: skip` only if a
    whole split is unusable. Labels out of range always raise: they are an error of the whole set, which skipping
    images would hide.
    """
    report = Report()
    known = {role: found for role, (source, indices) in sources.items() if (found := _known(source, indices))}
    findings = list(_look_at_all(config, sources, known))
    report.checked = sum(finding.decoded for finding in findings)
    bad = [finding for finding in findings if finding.problem]
    if fatal := [finding for finding in bad if finding.fatal or (config.on_error == "stop" and not finding.bare)]:
        hint = [] if any(finding.fatal for finding in fatal) else ["data.on_error=skip leaves such files out"]
        raise InputError(shortened([finding.problem for finding in fatal]) + hint)
    bare = {(finding.role, finding.index): finding for finding in [*bad, *_unlabelled(sources)] if finding.bare}
    lost = {(finding.role, finding.index) for finding in bad} | bare.keys()
    report.skipped = {finding.name: finding.problem for finding in [*bad, *bare.values()]}
    for role, (source, indices) in sources.items():
        if isinstance(source, StreamSource):
            continue
        report.usable[role] = [index for index in indices if (role, index) not in lost]
        if not report.usable[role]:
            raise InputError(
                [f"data: no image of the {role} split can be used", *shortened(list(report.skipped.values()))]
            )
        sizes = [(finding.size, finding.index) for finding in findings if finding.role == role and finding.size[0]]
        sizes += known[role].sizes if role in known and findings else []
        if sizes:
            least, thin = min(sizes, key=lambda item: min(item[0])), min(sizes, key=lambda item: _shape(*item[0]))
            report.extremes[role] = list(dict.fromkeys([least[1], thin[1]]))
    report.warnings = _same_pictures([finding for finding in findings if finding.role != "unlabelled"])
    _refuse_scored(findings)
    _review_labels(findings, report, class_names or {}, known)
    untold = [one for one in bare.values() if not getattr(sources[one.role][0], "announced", False)]
    if untold:
        what = getattr(sources[untold[0].role][0], "called", "mask")
        logger.warning("data: %d images without a %s are skipped, first %s", len(untold), what, untold[0].name)
    faults = [finding.problem for finding in bad if not finding.bare]
    for problem in shortened([*faults, *itertools.chain(*report.dropped.values())]):
        logger.warning("skipped: %s", problem)
    for warning in report.warnings:
        logger.warning("data: %s", warning)
    return report


def _look_at_all(config: DataConfig, sources: Sources, known: Mapping[str, Known]) -> Iterator[_Finding]:
    """Decode and check samples in a few threads (Pillow releases the GIL), and look for the files of the others."""
    todo: list[tuple[str, Source, int]] = []
    rest: list[tuple[str, FolderSource, int]] = []
    for role, (source, indices) in sources.items():
        if isinstance(source, StreamSource) or source.generated:
            continue
        chosen = _chosen(config, indices, known.get(role))
        todo += [(role, source, index) for index in chosen]
        if chosen and isinstance(source, FolderSource):
            rest += [(role, source, index) for index in sorted({*indices} - {*chosen})]
    if rest:
        logger.info(
            "data: %d images are decoded before training, of %d others only the files are looked for; data.check=all "
            "decodes all",
            *(len(todo), len(rest)),
        )
    if todo:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            yield from told(pool.map(lambda item: _look(*item), todo), "decoding images", len(todo))
    for role, folder, index in told(rest, "looking for images", len(rest)):
        if problem := folder.absent(index):
            yield _Finding(role, index, folder.name(index), problem=problem, decoded=False)


def _chosen(config: DataConfig, indices: Sequence[int], known: Known | None) -> list[int]:
    """The images to decode: `check` of them, spread evenly, and of those that are suspect as many."""
    count = {"all": len(indices), "none": 0}.get(str(config.check), config.check)

    def some(of: Sequence[int]) -> list[int]:
        places = np.linspace(0, len(of) - 1, min(int(count), len(of))).astype(int)
        return [of[place] for place in places.tolist()]

    return sorted({*some(indices), *some(known.suspects if known else [])})


def _unlabelled(sources: Sources) -> Iterator[_Finding]:
    """The images of folders without a label where each needs one, whether they are looked at or not."""
    for role, (source, indices) in sources.items():
        known = set(getattr(source, "unlabelled", ()))
        for index in indices if known else ():
            if index in known:
                assert isinstance(source, FolderSource)
                name = source.name(index)
                yield _Finding(role, index, name, problem=f"{name}: {source.no_mask}", bare=True)


def _look(role: str, source: Source, index: int) -> _Finding:
    """Decode and check one sample."""
    finding = _Finding(role, index, source.name(index))
    try:
        sample = source.load(index)
    except (Unusable, WrongLabels) as problem:
        finding.problem = str(problem)
        finding.fatal, finding.bare = isinstance(problem, WrongLabels), isinstance(problem, Unlabelled)
        return finding
    finding.name = sample.name
    finding.digest = picture_hash(sample.image)
    finding.size = sample.image.shape[-2], sample.image.shape[-1]
    finding.label = None if sample.target is None else sample.target.summary()
    return finding


def _known(source: AnySource, indices: Sequence[int]) -> Known | None:
    """What a source knows of its images, if anything."""
    return source.known(indices) if isinstance(source, FolderSource) else None


def _review_labels(
    findings: list[_Finding], report: Report, class_names: dict[int, str], known: Mapping[str, Known]
) -> None:
    """Report dropped parts and oddities of labels, and classes that training never sees. Raises InputError where
    oddities of many labels must be a fault of the whole set."""
    labels = [(finding, finding.label) for finding in findings if finding.label is not None]
    if not labels:
        return
    report.dropped = {finding.name: list(label.dropped) for finding, label in labels if label.dropped}
    report.empty = {finding.name: list(label.empty) for finding, label in labels if label.empty}
    doubtful = [finding.name for finding, label in labels if label.doubtful]
    noun, review = labels[0][1].noun, labels[0][1].review
    reviewed = review(doubtful, sum(label.counted for _, label in labels), class_names)
    report.warnings += shortened([text for _, label in labels for text in label.warnings]) + reviewed
    seen = frozenset().union(*(label.classes for finding, label in labels if finding.role == "train"))
    seen |= known["train"].labels if seen and "train" in known else frozenset()
    missing = [name for label, name in class_names.items() if label not in seen]
    if seen and missing:
        report.warnings.append(f"no training {noun} that was checked holds {', '.join(shortened(missing))}")


def _shape(height: int, width: int) -> float:
    """Short side by long side."""
    return min(height, width) / max(height, width)


def _refuse_scored(findings: list[_Finding]) -> None:
    """Raises InputError for unlabelled pictures that are scored too, in whatever files they are."""
    scored = {
        one.digest: f"{one.name} ({one.role})" for one in findings if one.role in ("eval", "test") and one.digest
    }
    unlabelled = [one for one in findings if one.role == "unlabelled"]
    refuse_unlabelled([f"{one.name} = {scored[one.digest]}" for one in unlabelled if one.digest in scored])


def _same_pictures(findings: list[_Finding]) -> list[str]:
    """Warn of pictures in two splits: a model can memorise them in one and be scored on them in the other."""
    first: dict[str, _Finding] = {}
    pairs: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        if not finding.digest:
            continue
        other = first.setdefault(finding.digest, finding)
        if other.role != finding.role:
            pairs.setdefault((other.role, finding.role), []).append(f"{finding.name} = {other.name}")
    return [
        f"{len(names)} pictures of the {second} split are also in the {one} split, first {names[0]}"
        for (one, second), names in pairs.items()
    ]
