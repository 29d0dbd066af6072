"""The record of a finished arm in its folder, by which a rerun keeps it."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.names import ARM_FILE
from cankd_hf.runs.record import Arm, write_json
from cankd_hf.training.checkpoint_files import digest

logger = logging.getLogger(__name__)

# What later arms, tables, cards and pictures read of an arm.
_KEPT = ("*.safetensors", "config.json", "preprocessor_config.json", "distillation.json")


def write_arm(folder: Path, arm: Arm, taps: list[dict[str, Any]]) -> None:
    """Writes `arm.json` with the digests of the arm's files into its folder."""
    files = {path.name: digest(path) for pattern in _KEPT for path in sorted(folder.glob(pattern))}
    write_json(folder / ARM_FILE, {**vars(arm), "taps": taps, "files": files})


def finished_arm(folder: Path, name: str) -> Arm | None:
    """The finished arm of this name in a folder; None, with a warning, if its record or one of its files is damaged.

    It is made again then: its last checkpoint is at its last step.
    """
    file = folder / ARM_FILE
    if not file.is_file():
        return None
    try:
        saved = {"cost": {}, "prepaid": {}, "working": {}, **read_json(file)}  # arms of before have none
        arm = Arm(**{field.name: saved[field.name] for field in fields(Arm)} | {"folder": str(folder)})
        files = dict(saved.get("files") or saved.get("weights") or {})
    except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s: %s cannot be read (%s); made again", name, file, error)
        return None
    if arm.name != name:
        return None
    for path, kept in files.items():
        if not (folder / path).is_file() or digest(folder / path) != kept:
            logger.warning("%s: %s is missing or changed; made again", name, folder / path)
            return None
    return arm
