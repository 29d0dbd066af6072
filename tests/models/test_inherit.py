"""The inheriting strategy: what fits is copied, what does not is said."""

from __future__ import annotations

import pytest
import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from cankd_hf.errors import InputError
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.models.inherit import inherit

RESNET = {"model_type": "resnet", "embedding_size": 8, "depths": [1, 1, 1, 1], "layer_type": "basic"}


def model(width: int, fpn: int = 16) -> FPNForSemanticSegmentation:
    backbone = {**RESNET, "hidden_sizes": [width, width, 16, 16]}
    return FPNForSemanticSegmentation(FPNConfig(backbone_config=backbone, fpn_channels=fpn, head_channels=16))


def test_neck_and_head_are_copied_and_the_backbone_is_not() -> None:
    student, teacher = model(8), model(24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    neck, head = inherit(student, teacher, ["neck", "head"])
    now, given = student.state_dict(), teacher.state_dict()
    # The lateral convolutions of the two finer levels read backbones of other widths.
    assert sorted(name.split(" ")[0] for name in neck.left) == [
        "neck.pyramid.inner_blocks.0.0.weight",
        "neck.pyramid.inner_blocks.1.0.weight",
    ]
    assert "[16, 24, 1, 1] in the teacher, [16, 8, 1, 1] here" in neck.left[0]
    assert not head.left and "head: " in str(head)
    for name in neck.copied + head.copied:
        assert torch.equal(now[name], given[name])
    for name in before.keys() - set(neck.copied) - set(head.copied):
        assert torch.equal(now[name], before[name]), name


def test_what_cannot_be_inherited_is_told_at_once_and_changes_nothing() -> None:
    student, teacher = model(8), model(8, fpn=24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(InputError) as told:
        inherit(student, teacher, ["neck", "decode_head", "head"])
    assert len(told.value.problems) == 2
    assert "nothing of 'neck' fits" in told.value.problems[0]
    assert "no part 'decode_head'; it has backbone, head, neck" in told.value.problems[1]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_native_decoder_is_inherited_as_far_as_it_goes() -> None:
    """RT-DETR from RT-DETR of more layers: those that both have, and parameters named by themselves."""
    tiny = {"encoder_layers": 1, "encoder_ffn_dim": 16, "num_queries": 6, "d_model": 32, "encoder_hidden_dim": 32}
    tiny |= {"encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32] * 3, "decoder_ffn_dim": 16}
    tiny |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    backbone = {**RESNET, "model_type": "rt_detr_resnet", "hidden_sizes": [8, 8, 16, 16], "out_indices": [2, 3, 4]}

    def detector(layers: int) -> RTDetrForObjectDetection:
        inner = RTDetrResNetConfig(**{key: value for key, value in backbone.items() if key != "model_type"})
        return RTDetrForObjectDetection(RTDetrConfig(**tiny, decoder_layers=layers, backbone_config=inner))

    student, teacher = detector(1), detector(2)
    before = student.model.backbone.state_dict()["model.encoder.stages.0.layers.0.layer.0.convolution.weight"].clone()
    decoder, head = inherit(student, teacher, ["model.decoder", "model.enc_score_head"])
    assert not decoder.left and not head.left
    assert decoder.mark == "model.decoder" and len(head.copied) == 2
    now, given = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(now[name], given[name]) for name in decoder.copied + head.copied)
    assert torch.equal(now["model.backbone.model.encoder.stages.0.layers.0.layer.0.convolution.weight"], before)
    (other_way,) = inherit(teacher, student, ["model.decoder"])
    assert other_way.left and other_way.mark == f"model.decoder ({len(other_way.copied)} of {total(teacher)} tensors)"
    assert "model.decoder.layers.1." in other_way.left[0] and "(the teacher has none)" in str(other_way)
    (one,) = inherit(student, teacher, ["model.enc_score_head.bias"])
    assert one.copied == ["model.enc_score_head.bias"]


def total(model: RTDetrForObjectDetection) -> int:
    return sum(name.startswith("model.decoder.") for name in model.state_dict())
