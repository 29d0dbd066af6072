"""Converted segmentation models against MMSegmentation's conventions, re-derived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint
from cankd_hf.errors import InputError
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

from .openmmlab import Naive, State, conv, filled, fpn, linear, norm, resnet, saved, towers

K, WIDTH, FULL = 5, 8, {"layers": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "stem": 64}
RATES = (12, 24, 36)


def module(name: str, out: int, into: int, kernel: int) -> list[tuple[str, Any]]:
    return [*conv(f"{name}.conv", out, into, kernel, False), *norm(f"{name}.bn", out)]


def psp() -> State:
    shapes = [*resnet(**FULL, deep=True)]
    for place in range(4):
        shapes += module(f"decode_head.psp_modules.{place}.1", WIDTH, 2048, 1)
    shapes += module("decode_head.bottleneck", WIDTH, 2048 + 4 * WIDTH, 3) + [
        *conv("decode_head.conv_seg", K, WIDTH, 1)
    ]
    shapes += module("auxiliary_head.convs.0", WIDTH // 2, 1024, 3)
    return filled([*shapes, *conv("auxiliary_head.conv_seg", K, WIDTH // 2, 1)])


def deeplab() -> State:
    shapes = [*resnet(**FULL)] + module("decode_head.image_pool.1", WIDTH, 2048, 1)
    for place in range(4):
        shapes += module(f"decode_head.aspp_modules.{place}", WIDTH, 2048, 3 if place else 1)
    shapes += module("decode_head.bottleneck", WIDTH, 5 * WIDTH, 3)
    return filled([*shapes, *conv("decode_head.conv_seg", K, WIDTH, 1)])


def logits(naive: Naive, x: Tensor, kind: str) -> Tensor:
    def read(name: str, y: Tensor, **options: Any) -> Tensor:
        return F.relu(naive.batch(f"{name}.bn", naive.conv(f"{name}.conv", y, **options)))

    def back(y: Tensor) -> Tensor:
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)

    if kind == "pspnet":
        bins = enumerate((1, 2, 3, 6))
        parts = [x, *(back(read(f"decode_head.psp_modules.{i}.1", F.adaptive_avg_pool2d(x, n))) for i, n in bins)]
    else:
        parts = [back(read("decode_head.image_pool.1", F.adaptive_avg_pool2d(x, 1)))]
        parts.append(read("decode_head.aspp_modules.0", x))
        for place, rate in enumerate(RATES, 1):
            parts.append(read(f"decode_head.aspp_modules.{place}", x, padding=rate, dilation=rate))
    return naive.conv("decode_head.conv_seg", read("decode_head.bottleneck", torch.cat(parts, 1), padding=1))


@pytest.mark.parametrize("kind", ["pspnet", "deeplabv3"])
def test_logits(kind: str, tmp_path: Path) -> None:
    state = psp() if kind == "pspnet" else deeplab()
    meta = {"dataset_meta": {"classes": list("abcde")}}
    made = read_checkpoint(saved(tmp_path / "m.pth", state, **meta), "student")
    model, plan = convert(made, kind, "auto", None)
    assert [model.config.id2label[i] for i in range(K)] == list("abcde") and not made.left_out
    assert model.config.backbone_config.backbone == ("resnet50c" if kind == "pspnet" else "resnet50")
    image, naive = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1)), Naive(state)
    with torch.no_grad():
        found = model(pixel_values=image, output_hidden_states=True)
        maps = naive.backbone(image, dilations=(1, 1, 2, 4))
    torch.testing.assert_close(found.hidden_states[-1], maps[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, logits(naive, maps[3], kind), rtol=1e-4, atol=1e-4)
    if kind == "pspnet":
        assert model.config.auxiliary_weight == 0.4
        wanted = naive.batch(
            "auxiliary_head.convs.0.bn", naive.conv("auxiliary_head.convs.0.conv", maps[2], padding=1)
        )
        with torch.no_grad():
            second = model.head.auxiliary.eval()(found.hidden_states[-2])
        torch.testing.assert_close(second, naive.conv("auxiliary_head.conv_seg", wanted.relu()), rtol=1e-4, atol=1e-4)


def test_deformable_convolutions(tmp_path: Path) -> None:
    shapes = [
        *resnet(**FULL),
        *fpn(16, [512, 1024, 2048], 2048),
        *towers(("cls_convs", "reg_convs"), 16, 1, False, True),
    ]
    shapes += [*conv("bbox_head.retina_cls", 9 * K, 16, 3), *conv("bbox_head.retina_reg", 36, 16, 3)]
    for place in range(4):
        shapes += conv(f"backbone.layer2.{place}.conv2.conv_offset", 18, 128, 3)
    state = filled(shapes)
    made = read_checkpoint(saved(tmp_path / "m.pth", state), "student")
    model, _ = convert(made, "retinanet", "pytorch", None)
    model.save_pretrained(tmp_path / "model")
    again = FPNForObjectDetection.from_pretrained(tmp_path / "model")
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = again(pixel_values=image, output_hidden_states=True).hidden_states
        naive = Naive(state)
        wanted = naive.neck(naive.backbone(image)[1:], "input", relu=False)
    for ours, x in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    state = filled([*resnet(), *linear("decode_head.conv_seg", 2, 8)])
    cfg = "model = dict(backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))"
    for meta, said in (({"cfg": cfg}, "contracted dilations"), ({}, "timm's resnet")):
        made = read_checkpoint(saved(tmp_path / "m.pth", state, **meta), "student")
        with pytest.raises(InputError, match=said):
            convert(made, "pspnet", "auto", None)
