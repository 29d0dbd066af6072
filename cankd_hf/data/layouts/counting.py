"""What the masks of a set hold: every mask is decoded once, in threads, and what was found is kept for the next time.

A sample would not do: a class that is rare enough to be missed there would be an unknown label in the middle of a run.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cankd_hf.data.common.decode import SIXTEEN_BIT, Decoder, Unusable
from cankd_hf.data.common.labels import colour_code
from cankd_hf.data.common.progress import LONG, told
from cankd_hf.json_text import to_json

logger = logging.getLogger(__name__)
MOST = 4096  # values or colours of one mask; a photograph has more
_KEPT: dict[str, dict[str, Any]] = {}  # of this process, by fingerprint


@dataclass
class Held:
    """What masks hold, in pixels."""

    masks: int = 0
    values: Counter[int] = field(default_factory=Counter)  # of masks with one channel, or grey ones
    colours: Counter[int] = field(default_factory=Counter)  # of pictures, and of masks with a palette
    palette: dict[int, int] = field(default_factory=dict)  # index -> colour
    pictures: int = 0  # masks that are coloured pictures
    grey_pictures: int = 0  # masks that are pictures without colour
    palettes_differ: bool = False
    photograph: str = ""  # a mask with more values or colours than masks have
    broken: int = 0  # those that do not decode, of which the check of the images tells

    def add(self, other: "Held") -> None:
        """Adds what other masks hold."""
        self.masks += other.masks
        self.values += other.values
        self.colours += other.colours
        self.palettes_differ |= other.palettes_differ or any(
            self.palette.get(index, colour) != colour for index, colour in other.palette.items()
        )
        self.palette |= other.palette
        self.pictures += other.pictures
        self.grey_pictures += other.grey_pictures
        self.photograph = self.photograph or other.photograph
        self.broken += other.broken


def held_by(root: Path, masks: Sequence[str], max_pixels: int) -> Held:
    """What these masks of a folder hold; read anew if one of them has changed."""
    print_of = _fingerprint(root, masks)
    file = _store(print_of)
    if print_of not in _KEPT and file.is_file():
        _KEPT[print_of] = json.loads(file.read_text())
    if (kept := _KEPT.get(print_of)) is not None:
        counts = {key: Counter({int(one): n for one, n in kept[key].items()}) for key in ("values", "colours")}
        return Held(**{**kept, **counts, "palette": {int(key): one for key, one in kept["palette"].items()}})
    begun = time.monotonic()
    decoder, held = Decoder(max_pixels), Held()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: look_at(decoder, root / name, name), masks)
        for one in told(found, "counting the classes in the masks", len(masks)):
            held.add(one)
    _KEPT[print_of] = vars(held)
    if time.monotonic() - begun > LONG:
        _keep(file, held)
    return held


def _keep(file: Path, held: Held) -> None:
    """Writes down what was found; without it, all masks are decoded again the next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partly = file.with_suffix(f".{os.getpid()}")
        partly.write_text(to_json(vars(held)), encoding="utf-8")
        partly.replace(file)
    except OSError as error:
        logger.info("data: what %d masks hold is counted anew each time: %s", held.masks, error)
        return
    logger.info("data: %d masks were decoded to count their classes; kept in %s", held.masks, file)


def look_at(decoder: Decoder, path: Path, name: str) -> Held:
    """What one mask holds."""
    try:
        picture = decoder.picture(path, name)
    except Unusable:
        return Held(masks=1, broken=1)
    if picture.mode in ("LA", "PA"):
        picture = picture.convert(picture.mode[0])
    if picture.mode in ("L", "P", "1"):
        counts = np.bincount(np.asarray(picture).reshape(-1).astype(np.uint8), minlength=1)
        held = Held(masks=1, values=Counter({int(at): int(counts[at]) for at in np.flatnonzero(counts)}))
        return _with_palette(held, picture) if picture.mode == "P" else held
    if picture.mode in SIXTEEN_BIT:
        return _limited(Held(masks=1, values=_counted(np.asarray(picture))), name)
    if picture.mode in ("RGB", "RGBA"):
        pixels = np.asarray(picture)[..., :3]
        if (pixels == pixels[..., :1]).all():
            return Held(masks=1, grey_pictures=1, values=_counted(pixels[..., 0]))
        codes = (pixels.astype(np.int32) * np.array([65536, 256, 1], np.int32)).sum(-1)
        return _limited(Held(masks=1, pictures=1, colours=_counted(codes)), name)
    return Held(masks=1, photograph=name)


def _counted(numbers: np.ndarray) -> Counter[int]:
    values, counts = np.unique(numbers, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _limited(held: Held, name: str) -> Held:
    """The same; of a mask with too many values or colours only its name."""
    return held if len(held.values) + len(held.colours) <= MOST else Held(masks=1, photograph=name)


def _with_palette(held: Held, picture: Image.Image) -> Held:
    colours = np.array(picture.getpalette("RGB") or [], np.int32).reshape(-1, 3).tolist()
    for index, count in held.values.items():
        if index < len(colours):
            held.palette[index] = colour_code(colours[index])
            held.colours[held.palette[index]] += count
    return held


def _fingerprint(root: Path, masks: Sequence[str]) -> str:
    """A number for these masks as they are."""
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=16)
    for name in masks:
        try:
            stat = os.stat(root / name)
        except OSError as error:
            digest.update(f"{name}\0{error.errno}\0".encode("utf-8", "surrogateescape"))
            continue
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _store(print_of: str) -> Path:
    """The file that keeps what was found, in the cache of the Hub's libraries."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "cankd_hf" / "masks" / f"{print_of}.json"
