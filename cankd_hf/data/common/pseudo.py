"""Sets that `cankd label` wrote: what a run that trains on one must know, and must refuse."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import Sources, StreamSource
from cankd_hf.data.common.files import LABELS_LIMIT, parse, read_json, read_lines
from cankd_hf.data.common.hashes import refuse_shared, shared_pictures
from cankd_hf.errors import InputError
from cankd_hf.names import LABEL_FILE, LABEL_RECORDS


@dataclass
class PseudoLabels:
    """What a set's `label.json` says: nothing for any other set.

    Attributes:
        cost: what the labels cost, in seconds by name of the clock.
        notices: a line on where the labels of the training images come from.
    """

    cost: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def read_pseudo_labels(config: DataConfig, pictures: Callable[[], Sources]) -> PseudoLabels:
    """Reads how the labels of the training images were made, where a teacher made them.

    Args:
        config: the `data:` section.
        pictures: opens the splits without their labels, by role; only called for a set of `cankd label`.

    Raises:
        InputError: if pictures that a teacher labelled for training are in the validation or test split too; or for
            files that `cankd label` did not write.
    """
    root = Path(str(config.path))
    if not (root / LABEL_FILE).is_file():
        return PseudoLabels()
    report = read_json(root / LABEL_FILE, "data.path", LABELS_LIMIT)
    hashes = _hashes(root / LABEL_RECORDS)
    sources = dict(pictures())
    source, indices = sources.pop("train")
    assert not isinstance(source, StreamSource)
    made = {hashes[name]: name for index in indices if (name := source.name(index)) in hashes}
    if not made:
        return PseudoLabels()
    scored = [
        (other, index) for other, places in sources.values() for index in places if not isinstance(other, StreamSource)
    ]
    refuse_shared(
        [f"{name} = {other}" for other, name in shared_pictures(scored, made)],
        f"data.train_split: {root}",
        "label again with --not-in SET for each set that is scored on, or take the pictures out of one of the splits",
    )
    teacher = report.get("teacher") if isinstance(report, dict) else None
    cost = report.get("cost") if isinstance(report, dict) else None
    if not isinstance(teacher, dict) or not isinstance(cost, dict):
        raise InputError(
            f"data.path: {root / LABEL_FILE}: expected what `cankd label` writes, got other content; label again"
        )
    said = f"the labels of {len(made)} of {len(indices)} training images are a teacher's ({teacher.get('model')})"
    return PseudoLabels(cost, [said])


def labelled_by_teacher(config: DataConfig) -> set[str]:
    """Names in the data folder of the pictures that a teacher labelled; none for a set that it did not."""
    return {*_hashes(file)} if (file := Path(str(config.path)) / LABEL_RECORDS).is_file() else set()


def _hashes(file: Path) -> dict[str, str]:
    """Name in the data folder -> hash of each picture that a teacher labelled."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        record: Any = parse(line, f"{file} line {number}:")
        if isinstance(record, dict) and record.get("name") and record.get("picture"):
            found[str(record["name"])] = str(record["picture"])
    return found
