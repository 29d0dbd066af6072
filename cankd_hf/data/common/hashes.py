"""Hashes of pictures, by which the same one is known in two sets, under whatever name and in whatever format."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cankd_hf.data.common.dataset import Source
from cankd_hf.data.common.decode import Unusable
from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.progress import told
from cankd_hf.errors import InputError

THREADS = 4  # that decode: Pillow and torchvision release the GIL


def picture_hash(image: torch.Tensor) -> str:
    """128-bit hash, as hexadecimal digits, of a decoded picture [3, H, W] uint8, upright: its size and its pixels.

    A copy under another name, or in another format without loss, has the same; one that is resized or compressed anew
    has not.
    """
    found = hashlib.blake2b(f"{image.shape[-2]}x{image.shape[-1]}:".encode(), digest_size=16)
    found.update(image.permute(1, 2, 0).contiguous().numpy().data)
    return found.hexdigest()


def hashes_of(pictures: Sequence[tuple[Source, int]], text: str = "comparing images") -> dict[str, str]:
    """Hash -> name of each picture, given as a source and an index in it; those that do not decode are left out."""
    return {found: source.name(index) for (source, index), found in _hashed(pictures, text) if found}


def shared_pictures(pictures: Sequence[tuple[Source, int]], held_out: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, name of the same picture in `held_out`, hash -> name) of the pictures that are in both."""
    if not held_out:
        return []
    return [
        (source.name(index), held_out[found])
        for (source, index), found in _hashed(pictures, "comparing images with the held-out ones")
        if found in held_out
    ]


def refuse_shared(shared: list[str], place: str, fix: str) -> None:
    """Raises InputError if there are pictures that are learned from and scored.

    Args:
        shared: each `name = name in the scored split`.
        place: of the setting, such as `data.unlabelled`.
        fix: what to do about it.
    """
    if shared:
        said = (
            f"{place}: expected no picture of the validation and test splits, which would then be scored on what was "
            f"trained on, got {len(shared)}; {fix}"
        )
        raise InputError([said, *shortened(shared)])


def _hashed(pictures: Sequence[tuple[Source, int]], text: str) -> Iterator[tuple[tuple[Source, int], str]]:
    """Each picture with its hash, in their order; "" for one that does not decode."""

    def one(picture: tuple[Source, int]) -> tuple[tuple[Source, int], str]:
        source, index = picture
        try:
            return picture, picture_hash(source.load(index).image)
        except Unusable:  # told by the checks of its own set
            return picture, ""

    with ThreadPoolExecutor(THREADS) as pool:
        yield from told(pool.map(one, pictures), text, len(pictures))
