"""DINO: what its queries see of one another, its losses, its denoising, and that it is a detector like any other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou
from transformers import AutoModelForObjectDetection, set_seed

from cankd_hf.config.student import StudentConfig
from cankd_hf.features.auto_taps import auto_taps
from cankd_hf.features.dense import queries_of
from cankd_hf.features.taps import Taps
from cankd_hf.models import register
from cankd_hf.models.dino.configuration_cankd_dino import DINOConfig
from cankd_hf.models.dino.losses_cankd_dino import dino_loss
from cankd_hf.models.dino.modeling_cankd_dino import DINOForObjectDetection
from cankd_hf.models.partly_labelled import run_labelled
from cankd_hf.models.students import build_student
from tests.training.native_detector_configs import DINO

from .detectors import pictures
from .kinds import NAMES, SWIN, TIMM
from .test_partly_labelled import assert_cut, loss_and_gradients, pseudo_labels, run_pseudo

SIZE = {"height": 64, "width": 96}


def dino(seed: int = 0, **changes: Any) -> DINOForObjectDetection:
    """A tiny DINO of three layers with 12 queries, in train mode; its heads are no longer as they start."""
    set_seed(seed)
    names = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    model = DINOForObjectDetection(DINOConfig(**{**DINO, **names, **changes}))
    with torch.no_grad():
        for head in (*model.bbox_embed, model.encoder_bbox_embed):
            head.layers[-1].weight.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_denoising_groups_leak_nothing(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dino(**({"attn_implementation": "eager"} if attention == "eager" else {}))
    assert model.config._attn_implementation == attention
    images, labels = pictures(2, **SIZE)
    seen: list[Any] = []
    model.model.decoder.register_forward_hook(lambda _m, _a, output: seen.append(output))
    made = model._denoising(labels, 12)
    contents, boxes, _, meta = made
    count, groups = meta["dn_num_split"][0], meta["dn_num_group"]
    each = count // groups
    assert groups == 4 and each == 4  # 8 // 2 objects; as many positives as negatives

    def run(changed: slice) -> tuple[Tensor, Tensor]:
        other = (contents.clone(), boxes.clone())
        for x in other:
            x[:, changed] = torch.randn_like(x[:, changed])
        monkeypatch.setattr(model, "_denoising", lambda *_: (*other, *made[2:]))
        with torch.no_grad():
            model(images, labels=labels)
        output = seen.pop()
        return output.intermediate_hidden_states, output.intermediate_reference_points

    before = run(slice(0, 0))
    for group in range(groups):
        own = slice(group * each, (group + 1) * each)
        for one, other in zip(before, run(own), strict=True):
            same = torch.tensor([not group * each <= query < (group + 1) * each for query in range(count + 12)])
            assert torch.equal(one[:, :, same], other[:, :, same])
            assert (one[:, :, own] != other[:, :, own]).any(-1).all()
    # Matched queries are seen by all: they are no secret, and in a group all see each other.
    matched = model.model.query_embed.weight
    with torch.no_grad():
        matched[0] += 1
    assert (run(slice(0, 0))[0][:, -1, :count] != before[0][:, -1, :count]).any(-1).all()


def test_denoising_is_for_training_with_objects() -> None:
    model = dino()
    images, labels = pictures(2, **SIZE)
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}

    def parts(given: Any) -> set[str]:
        output = model(images, labels=given)
        assert output.logits.shape == (2, 12, 3) and output.pred_boxes.shape == (2, 12, 4)
        output.loss.backward()
        assert model.model.label_embed.weight.grad is not None  # several processes wait for it
        assert all(torch.isfinite(value) for value in output.loss_dict.values())
        return {key for key in output.loss_dict if "denoising" in key}

    assert len(parts(labels)) == 9 == len(parts([labels[0], nothing]))
    assert not parts([nothing, nothing])
    assert model._denoising(None, 12) == (None,) * 4 and model(images).loss is None
    queries = queries_of(model(images, labels=labels), model, training=True)
    assert queries is not None and queries["class_logits"].shape == (2, 12, 3)
    model.eval()
    assert not parts(labels)
    assert dino(num_denoising=0).model.label_embed is None


def naive_loss(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], pairs: Any = None) -> list[float]:
    """Focal, L1 and GIoU of one layer, object by object; `pairs`: (query, object) of each image, else the best."""
    total, found = sum(len(label["boxes"]) for label in labels), [0.0, 0.0, 0.0]

    def focal(logit: Tensor, is_class: bool) -> float:
        p = logit.sigmoid().double()
        value = -0.25 * (1 - p) ** 2 * p.log() if is_class else -0.75 * p**2 * (1 - p).log()
        return float(value)

    def apart(box: Tensor, target: Tensor) -> tuple[float, float]:
        shared = generalized_box_iou(*(box_convert(x[None], "cxcywh", "xyxy") for x in (box, target)))
        return float((box - target).abs().sum()), 1 - float(shared)

    for image, label in enumerate(labels):
        classes, targets = label["class_labels"].tolist(), label["boxes"]

        def cost(query: int, which: int, image: int = image, classes: Any = classes, targets: Any = targets) -> float:
            logit = logits[image, query, classes[which]]
            distance, overlap = apart(boxes[image, query], targets[which])
            return 2 * (focal(logit, True) - focal(logit, False)) + 5 * distance + 2 * overlap

        if pairs is None:
            orders = itertools.permutations(range(logits.shape[1]), len(classes))
            best = min(orders, key=lambda order: sum(cost(query, i) for i, query in enumerate(order)))
            matched = [(query, i) for i, query in enumerate(best)]
        else:
            matched = pairs[image]
        of = dict(matched)
        for query, kind in itertools.product(range(logits.shape[1]), range(logits.shape[2])):
            found[0] += focal(logits[image, query, kind], query in of and classes[of[query]] == kind)
        for query, which in matched:
            distance, overlap = apart(boxes[image, query], targets[which])
            found[1] += 5 * distance
            found[2] += 2 * overlap
    return [value / max(total, 1) for value in found]


def test_the_loss_is_a_naive_one() -> None:
    set_seed(0)
    counts, layers, queries, groups = (2, 1), 2, 4, 2
    labels = [
        {
            "class_labels": torch.randint(0, 3, (n,)),
            "boxes": torch.rand(n, 4) * 0.3 + torch.tensor([0.3] * 2 + [0.1] * 2),
        }
        for n in counts
    ]
    each = 2 * max(counts)  # of a group: positives of the fullest image, then negatives
    noisy = each * groups
    logits, boxes = torch.randn(2, layers, noisy + queries, 3), torch.rand(2, layers, noisy + queries, 4) * 0.5 + 0.2
    proposed = torch.randn(2, queries, 3), torch.rand(2, queries, 4) * 0.5 + 0.2
    positives = [torch.tensor([group * each + i for group in range(groups) for i in range(n)]) for n in counts]
    meta = {"dn_positive_idx": positives, "dn_num_group": groups, "dn_num_split": [noisy, queries]}
    config = DINOConfig(**DINO, num_labels=3, encoder_loss_coefficient=0.5, denoising_loss_coefficient=2.0)
    last = (logits[:, -1], labels, logits.device, boxes[:, -1], config)
    loss, parts, _ = dino_loss(*last, logits, boxes, *proposed, denoising_meta_values=meta)

    wanted: dict[str, float] = {}

    def add(suffix: str, values: list[float], factor: float = 1.0) -> None:
        named = zip(("ce", "bbox", "giou"), values, strict=True)
        wanted.update({f"loss_{name}{suffix}": factor * value for name, value in named})

    own = [(logits[:, i, noisy:], boxes[:, i, noisy:]) for i in range(layers)]
    add("", naive_loss(*own[1], labels))
    add("_0", naive_loss(*own[0], labels))
    add("_encoder", naive_loss(*proposed, labels), 0.5)
    pairs = [[(group * each + i, i) for group in range(groups) for i in range(n)] for n in counts]
    for i in range(layers):
        values = naive_loss(logits[:, i, :noisy], boxes[:, i, :noisy], labels, pairs)
        add(f"_denoising_{i}", values, 2.0 / groups)
    assert parts.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(parts[key]) == pytest.approx(value, rel=1e-4), key
    assert float(loss) == pytest.approx(sum(wanted.values()), rel=1e-5)
    config.auxiliary_loss = False
    named = {f"loss_{name}{suffix}" for name in ("ce", "bbox", "giou") for suffix in ("", "_encoder", "_denoising_0")}
    assert dino_loss(*last, logits, boxes, *proposed, denoising_meta_values=meta)[1].keys() == named


def test_boxes_look_forward_twice_and_no_further() -> None:
    model = dino(share_heads=False, num_denoising=0)
    output = model(pictures(2, **SIZE)[0])
    last = [head.layers[-1].weight for head in model.bbox_embed]
    for layer in range(3):
        slopes = torch.autograd.grad(
            output.intermediate_reference_points[:, layer].sum(), last, retain_graph=True, allow_unused=True
        )
        reached = [slope is not None and bool(slope.any()) for slope in slopes]
        assert reached == [layer - 1 <= head <= layer for head in range(3)]
    # Mixed query selection: positions come from the encoder, without a gradient; contents are learned.
    assert not output.init_reference_points.requires_grad
    best = output.enc_outputs_class.amax(-1).topk(12).indices
    proposed = output.enc_outputs_coord_logits.sigmoid().take_along_dim(best[..., None], 1)
    assert torch.equal(output.init_reference_points, proposed)


def test_noise_is_drawn_from_the_generator_of_torch() -> None:
    images, labels = pictures(2, **SIZE)
    model = dino()

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(images, labels=labels).loss

    first = loss(3)
    torch.randn(3)
    assert torch.equal(loss(3), first) and not torch.equal(loss(4), first)
    # Without any noise positives are the objects, negatives too.
    still = dino(box_noise_scale=0.0, label_noise_ratio=0.0)
    contents, boxes, _, _ = still._denoising(labels, 12)
    torch.testing.assert_close(boxes[:, :2].sigmoid(), torch.stack([label["boxes"] for label in labels]))
    assert torch.equal(contents[0, :2], still.model.label_embed(labels[0]["class_labels"]))


def test_unlabelled_images_and_pseudo_boxes() -> None:
    assert_cut(dino(num_denoising=0), [0, 1, 3])
    model, (images, labels) = dino(), pictures(4)
    some = [labels[0], None, labels[2], None]
    loss, gradients = loss_and_gradients(model, images, some)
    others = images.clone()
    others[[1, 3]] = torch.randn_like(others[[1, 3]])
    again, moved = loss_and_gradients(model, others, some)
    torch.testing.assert_close(loss, again)
    for key, value in gradients.items():
        torch.testing.assert_close(value, moved[key], rtol=2e-3, atol=2e-5)
    assert loss_and_gradients(model, images, [None] * 4)[0] == 0

    model = dino(num_denoising=0)
    pseudo = [None, pseudo_labels(labels[1]), None, pseudo_labels(labels[3])]
    task, second, slopes = run_pseudo(model, images, some, pseudo)
    alone, _ = loss_and_gradients(model, images[[0, 2]], [labels[0], labels[2]])
    wanted, own = loss_and_gradients(model, images[[1, 3]], [labels[1], labels[3]])
    torch.testing.assert_close((task, second), (alone, wanted), rtol=1e-4, atol=1e-5)
    for name, value in slopes.items():
        torch.testing.assert_close(value, own.get(name, 0 * value), rtol=2e-3, atol=2e-5, msg=name)
    # With denoising, of images of either kind; and what may be an object is no background.
    model = dino()
    nothing = {name: value[:0] for name, value in labels[1].items()}
    inputs = {"pixel_values": images, "labels": some}
    losses = []
    predicted = box_convert(model(images).pred_boxes[1].detach(), "cxcywh", "xyxy")
    for unsure in (predicted[:0], predicted):
        set_seed(1)
        output = run_labelled(model, inputs, [None, pseudo_labels(nothing, unsure), None, pseudo_labels(labels[3])])
        losses.append((output.loss, output["pseudo_loss"]))
    assert losses[0][0] == losses[1][0] and losses[0][1] > losses[1][1]


def test_taps_and_small_images() -> None:
    model = dino().eval()
    assert auto_taps(model) == ["model.encoder_maps"]
    for taps in ("auto", ["model.input_proj.*"], ["model.encoder_maps:0", "model.encoder_maps:2"]):
        levels = Taps(model, taps).levels((128, 192))
        strides = [8, 16, 32, 64] if len(taps) != 2 else [8, 32]
        assert [(round(level.stride), level.channels) for level in levels] == [(stride, 32) for stride in strides]
    with torch.no_grad():
        assert dino(num_queries=900).eval()(torch.randn(1, 3, *SIZE.values())).logits.shape[1] == 96 + 24 + 6 + 2


@pytest.mark.parametrize("backbone", [SWIN, {**TIMM, "backbone": "resnet10t"}], ids=["swin", "timm"])
def test_backbones_and_their_frozen_stem(backbone: dict[str, Any], tmp_path: Path) -> None:
    register()
    resnet = "timm" in backbone["model_type"]
    fields = {"model_type": "cankd_dino", **DINO, "backbone_config": backbone, "freeze_stem": True}
    model = build_student(StudentConfig(config=fields), AutoModelForObjectDetection, NAMES, None)
    assert isinstance(model, DINOForObjectDetection)
    images, labels = pictures(2, **SIZE)
    model(images, labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).train()
    for one in (model, again):
        frozen = [name for name, p in one.named_parameters() if not p.requires_grad]
        assert bool(frozen) == resnet and all(".layer1." in name or ".stages." not in name for name in frozen)
        assert not [n for n in frozen if any(f"layer{i}." in n for i in (2, 3, 4)) or "backbone" not in n]
    other = build_student(StudentConfig(model=str(tmp_path)), AutoModelForObjectDetection, {0: "a", 1: "b"}, None)
    assert len(other.model.label_embed.weight) == 2 and torch.equal(other.model.level_embed, model.model.level_embed)
    # A Swin has norms that only its last map would need.
    missing = [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not [name for name in missing if "backbone" not in name]


def test_mixed_precision_and_recomputing() -> None:
    images, labels = pictures(2, **SIZE)
    model = dino()

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(images, labels=labels).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, slopes = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = gradients()
    torch.testing.assert_close((again, recomputed), (loss, slopes), rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = gradients()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=0.2, atol=0)
    with torch.no_grad():
        assert model.eval().to(torch.bfloat16)(images.bfloat16()).pred_boxes.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"d_model": 40}, "d_model: expected a multiple of 32"),
        ({"num_queries": 0}, "num_queries: expected a whole number of at least 1"),
        ({"label_noise_ratio": 1.5}, "label_noise_ratio: expected 0 to 1"),
        ({"giou_cost": -1}, "giou_cost: expected at least 0"),
        ({"num_feature_levels": 2}, "num_feature_levels: expected at least the 3 stages"),
        ({"backbone_config": {}}, "expected a key 'model_type'"),
    ],
)
def test_bad_settings(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DINOConfig(**{**DINO, **fields})
