"""Parts of the training images that stand in for splits that a set does not have."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.folders import slice_of, usual_split

SEED = 0  # of the shuffle before the training images are cut
RUN = 20  # images from which on numbers are looked at
MOST = 200_000  # of more, names are not read again
_NUMBER = re.compile(r"(.*?)(\d+)(?:[^\d/]*\.\w+)")  # what comes before the last number of a name, and the number
ROLES = {"eval": "validation", "test": "test"}


def lacking(config: DataConfig, names: Sequence[str]) -> tuple[list[str], bool]:
    """What the recipe asks for and the set does not have, of the standard splits.

    Args:
        config: the `data:` section.
        names: the splits of the set.

    Returns:
        the roles (`eval`, `test`) that a part of the training images stands in for, and whether the test split is left
        out, as there is a validation split to score. Other names of splits are the business of whoever looks for them.
    """
    usual = {usual_split(name) for name in names}
    asked = {"eval": config.eval_split, "test": config.test_split}
    missing = [
        role
        for role, split in asked.items()
        if split is not None and usual_split(split) == ROLES[role] and ROLES[role] not in usual
    ]
    plain = re.fullmatch(
        r"([^\[\]+]+)(\[[^\[\]]*\])*", config.train_split.strip()
    )  # one part, which can be cut further
    if "train" not in usual or plain is None or usual_split(plain[1]) != "train":
        return [], False
    if "validation" in usual:
        return [], "test" in missing
    return [] if config.streaming else missing, False  # no part of a stream can be held out


def held_out(train: str, size: int, roles: Sequence[str], share: float) -> dict[str, str]:
    """Role -> slice, for `train` and the `roles` held out of it; the same images in each run.

    Args:
        train: the split to cut, such as `train`.
        size: its images, more than there are `roles`.
        roles: what is held out, of `eval` and `test`.
        share: of the images, for each of them.
    """
    each, unit, whole = max(1, round(100 * min(share, 0.5 / len(roles)))), "%", 100

    def ends() -> list[int]:
        return [whole - each * (len(roles) - number) for number in range(len(roles) + 1)]

    places = [0, *(round(end * size / 100) for end in ends())]  # as slices round them
    if any(first >= last for first, last in pairwise(places)):
        each, unit, whole = 1, "", size  # of so few, one image each
    names = ["train", *roles]
    bounds = [("", ends()[0]), *((str(first), last) for first, last in pairwise(ends()))]
    return {
        name: f"{train}[{first and first + unit}:{'' if last == whole else f'{last}{unit}'}@{SEED}]"
        for name, (first, last) in zip(names, bounds, strict=True)
    }


def by_clips(names: Sequence[str], slices: Mapping[str, str]) -> dict[str, str] | None:
    """Slices of the same roles that hold whole clips out, the last ones, where names of images are numbered in equal
    steps, as the frames of films are; None for others.

    Args:
        names: of the training images, in their order.
        slices: role -> slice, as `held_out` gives it.
    """
    if not RUN <= len(names) <= MOST:
        return None
    read = [_NUMBER.fullmatch(name) for name in names]
    clips = [one[1] if one else name for one, name in zip(read, names, strict=True)]
    steps = Counter(
        int(two[2]) - int(one[2]) for one, two in pairwise(read) if one is not None and two and one[1] == two[1]
    )
    if not steps or max(count if step > 0 else 0 for step, count in steps.items()) < 0.6 * len(names):
        return None
    starts = [place for place in range(1, len(names)) if clips[place] != clips[place - 1]]
    bounds = []
    for text in list(slices.values())[1:]:  # where the shuffled parts begin, at the start of a clip if one is near
        place = slice_of(text.replace(f"@{SEED}", ""), len(names))[1][0]
        near = min(starts, key=lambda start: abs(start - place), default=place)
        bounds.append(near if abs(near - place) <= len(names) / 20 else place)
    ends = ["", *map(str, bounds), ""]
    split = next(iter(slices.values())).partition("[")[0]
    return {role: f"{split}[{a}:{b}]" for role, (a, b) in zip(slices, pairwise(ends), strict=True)}


def _numbered(names: Sequence[str], clips: Mapping[str, str] | None, random: Mapping[str, str]) -> str:
    """What to tell of images that are numbered in runs.

    Args:
        names: of the images.
        clips: slices that hold the last of them out, to be named as the other choice; None: they are held out.
        random: slices that hold others out.
    """
    first, second = (name.rpartition("/")[2] for name in (names[0], names[1]))
    said = (
        f"images are numbered in runs ({first}, {second}, ...): if they are frames of films, those held out at random "
        f"have neighbours in training that show the same, and scores are too good; "
    )
    if clips is not None:
        return f"{said}to hold out the last of them instead: {_settings(clips, ' ')}"
    return (
        f"{said}so the last of them are held out; if they are not, hold them out at random: {_settings(random, ' ')}"
    )


def _settings(slices: Mapping[str, str], between: str) -> str:
    """The settings of the slices of roles."""
    return between.join(f"data.{role}_split={split}" for role, split in slices.items())


def with_held_out(
    config: DataConfig, size: int, roles: Sequence[str], path: str, names: Sequence[str] = (), clips: bool = False
) -> tuple[DataConfig, list[str]]:
    """The same section with slices of the training split for `roles`, and what to tell of it.

    Args:
        config: the `data:` section.
        size: its training images.
        roles: what is held out, of `eval` and `test`.
        path: of the set, for messages.
        names: of the training images, where they have any.
        clips: whether the last images are held out where they may be frames of films, for settings that are written
            down; a run that says nothing holds others out, whatever the images are called.
    """
    random = held_out(config.train_split, size, roles, config.holdout)
    last = by_clips(names, random) if len(names) == size else None
    slices = last if clips and last is not None else random
    parts = " or ".join(ROLES[role] for role in roles)
    splits: dict[str, Any] = {f"{role}_split": split for role, split in slices.items()}
    said = [
        f"no {parts} split in {path}: a part of {config.train_split} is held out for it, the same in each run, "
        f"as with {_settings(slices, ', ')}"
    ]
    if last is not None:
        said.append(_numbered(names, None if clips else last, random))
    return replace(config, **splits), said
