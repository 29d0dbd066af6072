"""The pyramid students in detail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ConvNextConfig, Dinov2Config, ResNetConfig

from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation, probe
from cankd_hf.models.students import StudentConfig

from .kinds import DINOV2, IGNORED, RESNET, batch, student


def test_loss_is_the_mean_cross_entropy_at_the_labels_size() -> None:
    model = student("resnet_fpn").eval()
    images, _ = batch(64, 48)
    for height, width in ((64, 48), (31, 100)):
        _, labels = batch(height, width)
        output = model(images, labels=labels)
        logits = F.interpolate(output.logits, (height, width), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        torch.testing.assert_close(output.loss, expected)


def test_a_batch_without_labels_costs_nothing() -> None:
    model = student("timm_psp")
    images, labels = batch()
    output = model(images, labels=torch.full_like(labels, IGNORED))
    output.loss.backward()
    assert output.loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_auxiliary_classifier_counts_in_training_only() -> None:
    model = student("timm_psp", auxiliary_weight=0.4, dropout=0.0)
    plain = student("timm_psp", auxiliary_weight=0.0, dropout=0.0)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, labels = batch()
    assert model(images, labels=labels).loss > 1.1 * plain(images, labels=labels).loss
    model.eval(), plain.eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(images, labels=labels).loss, plain(images, labels=labels).loss)


@pytest.mark.parametrize("kind", ["resnet_fpn", "dinov2_pyramid", "timm_aspp"])
def test_bf16_autocast_gives_a_float32_loss(kind: str) -> None:
    model = student(kind)
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, labels=labels)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)


@pytest.mark.parametrize("kind", ["resnet_fpn", "dinov2_pyramid", "timm_psp", "timm_aspp"])
def test_channels_last_changes_nothing(kind: str) -> None:
    model = student(kind).eval()
    images, _ = batch()
    expected = model(images).logits
    model = model.to(memory_format=torch.channels_last)
    got = model(images.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["resnet_fpn", pytest.param("dinov2_pyramid", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_and_its_gradients(kind: str) -> None:
    model = student(kind, dropout=0.0)
    images, labels = batch()
    expected = model(images, labels=labels).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(images, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch._dynamo.reset()


def test_what_the_trainer_and_fsdp_ask_for() -> None:
    model = student("dinov2_pyramid")
    assert model.accepts_loss_kwargs is False
    assert "Dinov2Layer" in model._no_split_modules
    assert isinstance(model.get_input_embeddings(), nn.Conv2d)


def test_channels_are_measured_because_configurations_lie() -> None:
    model = student("hgnet_fpn")
    assert model.backbone.channels[0] == 8
    assert probe(model.backbone) == [(12, 4.0), (16, 8.0), (16, 16.0), (24, 32.0)]


def test_probing_leaves_statistics_and_random_numbers_alone() -> None:
    backbone = student("resnet_fpn").backbone
    before, state = {k: v.clone() for k, v in backbone.state_dict().items()}, torch.get_rng_state()
    probe(backbone)
    assert backbone.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_initialisation_is_torchvisions_not_the_librarys() -> None:
    model = student("resnet_fpn", fpn_channels=64, head_channels=64)
    for conv in (model.neck.pyramid.layer_blocks[0][0], model.head.layers[0][0]):
        fan_in = conv.weight[0].numel()
        assert abs(conv.weight.std().item() * fan_in**0.5 - 1) < 0.1  # the library's 0.02 would give 0.48
    assert student("timm_aspp", norm="group").head.context.aspp.project[1].weight.eq(1).all()


def test_simple_pyramid_keeps_positions_of_sizes_that_no_patch_divides() -> None:
    """A bright square in the lower right corner of a 69x69 image: a ViT alone would cut 13 pixels off there."""
    neck = student("dinov2_pyramid").neck
    image = torch.zeros(1, 3, 69, 69)
    image[..., 57:, 57:] = 1.0
    fitted = neck.fit(image)
    assert fitted.shape[-2:] == (70, 70)
    assert fitted[..., 60:, 60:].mean() > 0.9
    assert neck.fit(torch.zeros(1, 3, 3, 5)).shape[-2:] == (14, 14)


def test_strides_choose_levels() -> None:
    assert [s for _, s in student("resnet_fpn", strides=[16, 8]).levels] == [8.0, 16.0]
    assert [s for _, s in student("dinov2_pyramid").levels] == [3.5, 7.0, 14.0, 28.0]
    assert [s for _, s in student("dinov2_pyramid", strides=[16]).levels] == [14.0]
    assert [s for _, s in student("timm_psp").levels] == [8.0, 8.0]


def test_group_norm_leaves_no_batch_norm_in_neck_and_head() -> None:
    for kind in ("resnet_fpn", "timm_psp", "timm_aspp"):
        model = student(kind, norm="group")
        own = [m for part in (model.neck, model.head) for m in part.modules()]
        assert not any(isinstance(m, nn.BatchNorm2d) for m in own)
        images, labels = batch(size=1)
        model.backbone.eval()
        assert torch.isfinite(model(images, labels=labels).loss)


def test_pooling_heads_say_why_one_image_is_too_few() -> None:
    images, _ = batch(size=1)
    for kind in ("timm_psp", "timm_aspp"):
        with pytest.raises(ValueError, match="norm: group"):
            student(kind)(images)


def test_the_backbone_of_a_given_config_is_a_copy() -> None:
    given = ResNetConfig(**RESNET)
    config = FPNConfig(backbone_config=given)
    assert given.out_indices == [4] and config.backbone_config.out_indices == [1, 2, 3, 4]
    assert FPNConfig(ResNetConfig(**RESNET, out_indices=[2, 4])).backbone_config.out_indices == [2, 4]
    assert FPNConfig(head="psp").backbone_config.out_indices == [4]
    assert FPNConfig(head="psp", auxiliary_weight=0.4).backbone_config.out_indices == [3, 4]
    assert FPNConfig(Dinov2Config(), neck="simple_pyramid").backbone_config.out_indices == [12]
    again = FPNConfig.from_dict(FPNConfig(ConvNextConfig(), strides=[8, 16]).to_dict())
    assert isinstance(again.backbone_config, ConvNextConfig) and again.strides == [8, 16] and again.neck == "fpn"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"neck": "fnp"}, "FPNConfig.neck: expected one of fpn, simple_pyramid, none, got 'fnp'"),
        ({"head": "deeplab"}, "FPNConfig.head"),
        ({"norm": "layer"}, "FPNConfig.norm"),
        ({"fpn_channels": 0}, "FPNConfig.fpn_channels"),
        ({"head_channels": 1.5}, "FPNConfig.head_channels"),
        ({"dropout": 1}, "FPNConfig.dropout"),
        ({"strides": [6]}, "powers of two"),
        ({"auxiliary_weight": -1}, "auxiliary_weight"),
        ({"head": "psp", "neck": "fpn"}, "set neck to 'none'"),
        ({"backbone_config": {"depths": [1]}}, "model_type"),
        ({"backbone_config": {**DINOV2, "num_hidden_layers": 12}}, "simple_pyramid"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FPNConfig(**settings)


def test_a_stride_that_the_backbone_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="no map of stride 64"):
        FPNForSemanticSegmentation(FPNConfig(RESNET, strides=[8, 64]))


def test_student_config_is_plain_data() -> None:
    assert StudentConfig(backbone="x").fpn == {}
