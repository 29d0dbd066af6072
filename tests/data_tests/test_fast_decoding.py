"""JPEGs decoded without Pillow: its pixels, its refusals, and its memory order kept up to the crop."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

from cankd_hf.data.common import decode
from cankd_hf.data.common.cache import SampleCache
from cankd_hf.data.common.decode import Decoder, Sample, Unusable
from cankd_hf.data.common.transforms import Normalize, RandomScaleCrop


def jpeg(mode: str = "RGB", size: tuple[int, int] = (94, 61), turned: int = 1, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[decode.ORIENTATION] = turned
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


FILES = {
    "4:4:4": jpeg(subsampling=0),
    "4:2:2": jpeg(subsampling=1),
    "4:2:0": jpeg(subsampling=2),
    "progressive": jpeg(progressive=True),
    "grey": jpeg("L"),
    "rgb inside": jpeg(keep_rgb=True),
    "cmyk": jpeg("CMYK"),
    "coarse": jpeg(quality=3),
    "restarts": jpeg(restart_marker_blocks=2),
    "one pixel": jpeg(size=(1, 1)),
    **{f"turned {turned}": jpeg(turned=turned) for turned in (2, 6, 8)},
}


def by_pillow(content: bytes) -> torch.Tensor:
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("from_file", [False, True])
def test_pixels_are_those_of_pillow(name: str, from_file: bool, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FILES[name])
    image = Decoder().image(tmp_path / "a.jpg" if from_file else FILES[name], "a.jpg")
    assert image.dtype == torch.uint8 and torch.equal(image, by_pillow(FILES[name]))


def outcome(content: bytes) -> torch.Tensor | str:
    try:
        return Decoder().image(content, "a.jpg")
    except Unusable as problem:
        return str(problem)


@pytest.mark.parametrize("name", ["4:2:0", "progressive", "grey", "restarts"])
def test_damaged_files_end_as_with_pillow_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, damaged = random.Random(name), []
    for _ in range(25):
        content = bytearray(FILES[name])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged += [bytes(content), FILES[name][: draw.randrange(len(content))]]
    found = [outcome(content) for content in damaged]
    monkeypatch.setattr(decode, "_fast_jpeg", lambda *_: None)
    for ours, alone in zip(found, map(outcome, damaged), strict=True):
        assert torch.equal(ours, alone) if isinstance(ours, torch.Tensor) else ours == alone  # type: ignore[arg-type]
    assert {type(one) for one in found} == {str, torch.Tensor}


def test_a_torchvision_without_the_operator_leaves_it_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Decoder().image(FILES["4:2:0"], "a.jpg")
    monkeypatch.setattr(torch.ops, "image", type("Empty", (), {})())
    assert torch.equal(Decoder().image(FILES["4:2:0"], "a.jpg"), expected)


def test_large_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_fast_jpeg", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Unusable, match="94 x 61 pixels are more than data.max_pixels = 100"):
        Decoder(max_pixels=100).image(FILES["4:4:4"], "a.jpg")


@pytest.mark.parametrize("scale", [(0.3, 0.3), (1.0, 1.0), (2.5, 2.5)])
def test_crops_do_not_depend_on_the_order_in_memory(scale: tuple[float, float]) -> None:
    image = Decoder().image(FILES["4:4:4"], "a.jpg")
    assert image.permute(1, 2, 0).is_contiguous()
    crop, normalize = RandomScaleCrop((40, 60), scale, None, [1, 2, 3], 255), Normalize([0.5] * 3, [0.25] * 3)
    items = []
    for given in (image, image.contiguous()):
        torch.manual_seed(3)
        items.append(normalize(crop(tv_tensors.Image(given))))
    assert torch.equal(*items) and all(item.is_contiguous() for item in items)
    if scale[0] < 1:
        background = (torch.tensor([1.0, 2, 3]).view(3, 1, 1) - 127.5) / 63.75
        assert torch.equal(items[0][:, :1, :1], background) or torch.equal(items[0][:, -1:, -1:], background)


def test_the_cache_keeps_the_order_in_memory() -> None:
    image = Decoder().image(FILES["4:4:4"], "a.jpg")
    cache = SampleCache()
    for _ in range(2):
        kept = cache.sample(0, lambda number: Sample(image, None, "a.jpg")).image
        assert torch.equal(kept, image) and kept.stride() == image.stride()
