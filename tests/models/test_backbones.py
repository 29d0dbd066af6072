"""Backbones by every way of naming them, and what bad names get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, TimmBackbone, TimmBackboneConfig

from cankd_hf.errors import InputError
from cankd_hf.models.backbones import backbone_config, load_backbone

from .kinds import CONVNEXT, DINOV2, HGNET, PVT, RESNET, SWIN, TIMM

FAMILIES = {
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "swin": SWIN,
    "pvt": PVT,
    "hgnet": HGNET,
    "dinov2": DINOV2,
    "timm": TIMM,
}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same with running statistics that no fresh model has."""
    with torch.no_grad():
        model.train()(IMAGES)
    return model.eval()


def maps(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.eval()(IMAGES).feature_maps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_backbone_loads_from_its_folder(family: str, tmp_path: Path) -> None:
    indices = [1, 2] if family != "timm" else [-2, -1]
    model = moved(load_backbone(FAMILIES[family], out_indices=indices))
    assert len(maps(model)) == 2
    model.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert type(again) is type(model) and not again.training
    torch.testing.assert_close(maps(again), maps(model))
    last = load_backbone(str(tmp_path), out_indices=[-1])
    torch.testing.assert_close(maps(last)[0].shape, maps(load_backbone(tmp_path, out_indices=[-1]))[0].shape)
    assert len(maps(last)) == 1


@pytest.mark.parametrize("family", ["resnet", "convnext", "swin", "dinov2"])
def test_a_plain_model_loads_as_a_backbone(family: str, tmp_path: Path) -> None:
    """Norms that only the Backbone class has may be absent."""
    source = load_backbone(FAMILIES[family])
    AutoModel.from_config(source.config).save_pretrained(tmp_path)
    assert len(maps(load_backbone(tmp_path))) == 1


def test_the_dtype_is_float32_unless_asked(tmp_path: Path) -> None:
    load_backbone(RESNET).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_backbone(tmp_path).dtype == torch.float32
    assert load_backbone(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_backbone(RESNET, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_settings_beside_a_pretrained_source_override_its_own(tmp_path: Path) -> None:
    model = moved(load_backbone({**TIMM, "out_indices": [1, 4]}))
    model.save_pretrained(tmp_path)
    dilated = load_backbone({"pretrained": str(tmp_path), "output_stride": 8, "out_indices": [-1]})
    assert [x.shape[-2:] for x in maps(dilated)] == [(8, 8)]
    assert all(torch.equal(value, dilated.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_folder_of_timm_keeps_its_running_statistics(tmp_path: Path) -> None:
    """`TimmBackbone(pretrained=True)` of transformers loses them: a test that will say when that is mended."""
    import timm
    from timm.models import save_for_hf

    source = timm.create_model("test_resnet")
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3.0)
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    model = load_backbone(tmp_path, out_indices=[2, 3, 4])
    assert isinstance(model, TimmBackbone) and model.config.backbone == "test_resnet"
    means = [value for key, value in model.state_dict().items() if key.endswith("running_mean")]
    assert means and all((mean == 3).all() for mean in means)
    assert torch.equal(next(model.parameters()), next(source.parameters()))
    library = TimmBackbone(
        TimmBackboneConfig(backbone="test_resnet", out_indices=[-1]),
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
    )
    assert all((value == 0).all() for key, value in library.state_dict().items() if key.endswith("running_mean"))


def test_a_configuration_for_a_neck_asks_for_the_last_stage(tmp_path: Path) -> None:
    load_backbone(RESNET, out_indices=[3, 4]).save_pretrained(tmp_path)
    assert backbone_config(tmp_path).out_indices == [4]
    assert backbone_config({"pretrained": str(tmp_path), "out_indices": [2, 3]}).out_indices == [2, 3]
    assert backbone_config("timm/test_resnet").out_indices == [-1]


def test_the_saved_configuration_of_a_timm_model_is_read_again_with_random_weights(tmp_path: Path) -> None:
    load_backbone(TIMM).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["stage_names"]  # written by the model, and no field of its configuration
    assert load_backbone(saved).config.stage_names == saved["stage_names"]


def test_weights_that_are_missing_are_listed(tmp_path: Path) -> None:
    load_backbone(RESNET).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if key.endswith("convolution.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 are missing .*convolution.weight"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nobody/nothing", "nobody/nothing: expected a local folder with a config.json or a model id"),
        ("./not/here", "./not/here: expected a local folder"),
        ("timm/resnet18.a1_in1k", "pretrained weights cannot be loaded"),
        ("timm/resnot18", "Unknown model"),
        ({"depths": [1]}, "expected a key model_type"),
        ({"model_type": "resnat"}, "did you mean resnet"),
        ({"model_type": "vit"}, "Backbone class"),
        ({**RESNET, "depth": [1]}, "backbone.depth: no such key for resnet; did you mean depths"),
        ({**RESNET, "depths": "many"}, "'depths'"),
        ({**TIMM, "stage_name": []}, "stage_name: no such key for timm_backbone; did you mean stage_names"),
        ({**RESNET, "out_indices": [9]}, "out_indices"),
        ({"model_type": "timm_backbone", "backbone": "resnot18"}, "Unknown model"),
        ({"model_type": "timm_backbone"}, "cannot be built"),
        ({"pretrained": "timm/resnet18", "output_strid": 8}, "did you mean output_stride"),
    ],
)
def test_bad_sources_are_named(source: str | dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_backbone(source)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no_model: expected a model folder with a config.json"):
        (tmp_path / "no_model").mkdir()
        load_backbone(tmp_path / "no_model")
    load_backbone(RESNET).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_backbone(tmp_path)
    with pytest.raises(InputError, match="hidden_size: no such key for resnet; did you mean hidden_sizes"):
        load_backbone({"pretrained": str(tmp_path), "hidden_size": 3})
