"""What the tests of transformers ask of every model (tests/test_modeling_common.py there), asked of ours.

Left out for want of a subject: embeddings of tokens, head masks and pruning, feed-forward chunking, generation, tied
weights, and several problem types (a pyramid model has one loss).
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, logging

from cankd_hf.errors import InputError
from cankd_hf.models.backbones import load_backbone

from .detectors import DETECTORS, detector, pictures
from .kinds import FPN_KINDS, NAMES, batch, student

FEW = ["resnet_fpn", "dinov2_pyramid", "timm_psp", "retinanet_resnet", "faster_rcnn_dinov2"]
OTHERS = [kind for kind in [*FPN_KINDS, *DETECTORS] if kind not in FEW]
KINDS = [*FEW, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
ATTENTIVE = ["dinov2_pyramid", "swin_fpn", "fcos_dinov2"]


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    return (student if kind in FPN_KINDS else detector)(kind, **changes).eval()


def inputs_of(kind: str, size: int = 2) -> dict[str, Any]:
    images, labels = batch(size=size) if kind in FPN_KINDS else pictures(size)
    return {"pixel_values": images, "labels": labels}


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, a tuple or a dictionary, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return list(itertools.chain.from_iterable(tensors(part) for part in parts))


def assert_equal_outputs(one: Any, two: Any) -> None:
    first, second = tensors(one), tensors(two)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def equal_states(one: nn.Module, two: nn.Module) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_as_mapping_and_as_tuple(kind: str) -> None:
    model, inputs = model_of(kind), inputs_of(kind)
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    asked = model(**inputs, output_hidden_states=True)
    as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[-1] is not None
    assert_equal_outputs(asked, as_tuple)
    assert [tuple(x.shape[1:2]) for x in as_tuple[-1]] == [(channels,) for channels, _ in model.levels]
    assert len(asked) == len(plain) + 1 == len(as_tuple)

    model.config.output_hidden_states = model.config.return_dict = True
    assert_equal_outputs(model(**inputs), asked)
    assert model(**inputs, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple) and len(model(**inputs, return_dict=True).hidden_states)


@pytest.mark.parametrize("kind", ATTENTIVE)
@torch.no_grad()
def test_attentions_come_last_from_call_and_configuration(kind: str) -> None:
    model, inputs = model_of(kind), inputs_of(kind)
    model.set_attn_implementation("eager")
    asked = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert list(asked)[-2:] == ["hidden_states", "attentions"] or list(asked)[-1] == "attentions"
    assert asked.attentions and all(x.ndim == 4 and torch.isfinite(x).all() for x in asked.attentions)
    model.config.output_attentions = True
    assert_equal_outputs(model(**inputs).attentions, asked.attentions)
    assert model(**inputs, output_attentions=False).attentions is None


def test_attentions_of_a_backbone_without_any() -> None:
    images = inputs_of("resnet_fpn")["pixel_values"]
    assert model_of("resnet_fpn")(images, output_attentions=True).attentions is None
    with pytest.raises(ValueError, match="attentions"):
        model_of("timm_psp")(images, output_attentions=True)


@pytest.mark.parametrize("kind", ["resnet_fpn", "dinov2_pyramid", "retinanet_resnet"])
def test_hidden_states_keep_their_gradients(kind: str) -> None:
    model, inputs = model_of(kind), inputs_of(kind)
    output = model(**inputs, output_hidden_states=True)
    for x in output.hidden_states:
        x.retain_grad()
    output.loss.backward()
    assert all(x.grad is not None for x in output.hidden_states)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_forward_is_determined_and_the_batch_does_not_matter(kind: str) -> None:
    model, images = model_of(kind), inputs_of(kind, 3)["pixel_values"]
    together = model(images)
    assert_equal_outputs(together, model(images))
    for i, image in enumerate(images):
        alone = model(image[None])
        torch.testing.assert_close(alone.logits, together.logits[i : i + 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_does_not_hang_on_how_a_model_is_made(kind: str) -> None:
    """Every tensor is a parameter or a buffer, all of them finite; those missing in a checkpoint are initialised."""
    model = model_of(kind)
    for name, value in model.state_dict().items():
        assert torch.isfinite(value.float()).all(), name
    stray = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    assert not stray
    assert not model.all_tied_weights_keys


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_saved_alone_lies_under_the_head_again(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    assert model.base_model is model.backbone
    model.base_model.save_pretrained(tmp_path / "base")
    with_ours, info = type(model).from_pretrained(
        tmp_path / "base", config=copy.deepcopy(model.config), output_loading_info=True
    )
    assert equal_states(model.backbone, with_ours.backbone)
    own = {key for key in model.state_dict() if not key.startswith("backbone.")}
    uncounted = {key for key in own if not key.endswith("num_batches_tracked")}
    assert uncounted <= set(info["missing_keys"]) <= own and not info["unexpected_keys"]
    assert all(torch.isfinite(value.float()).all() for value in with_ours.state_dict().values())
    if kind in ("resnet_fpn", "timm_fpn", "swin_fpn", "retinanet_timm"):  # the configuration of the base model alone
        other = type(student("resnet_fpn")).from_pretrained(tmp_path / "base")
        assert equal_states(model.backbone, other.backbone) and other.config.model_type == "cankd_fpn"
        assert other.config.backbone_config.out_indices == model.backbone.config.out_indices

    model.save_pretrained(tmp_path / "whole")
    base = load_backbone(tmp_path / "whole")
    assert type(base) is type(model.backbone) and equal_states(model.backbone, base)
    assert base.config.out_indices == model.backbone.config.out_indices


def test_the_backbone_of_a_saved_model_takes_settings(tmp_path: Path) -> None:
    model_of("resnet_fpn").save_pretrained(tmp_path)
    assert load_backbone(tmp_path, out_indices=[1, 3]).config.out_indices == [1, 3]
    with pytest.raises(InputError, match="no such key"):
        load_backbone({"pretrained": str(tmp_path), "depht": 2})


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_sharded_and_torch_saves(kind: str, tmp_path: Path) -> None:
    model, images = model_of(kind), inputs_of(kind)["pixel_values"]
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "shards")
    assert equal_states(model, again)
    assert_equal_outputs(model(images), again(images))
    if "dinov2" not in kind:  # transformers hooks plain ViTs at their first forward with functions that do not pickle
        torch.save(model, tmp_path / "whole.pt")
        assert_equal_outputs(model(images), torch.load(tmp_path / "whole.pt", weights_only=False)(images))


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_dtypes_and_devices_of_from_pretrained(kind: str, tmp_path: Path) -> None:
    model, images = model_of(kind), inputs_of(kind)["pixel_values"]
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 == next(half.head.parameters()).dtype
    assert not getattr(half, "_keep_in_fp32_modules", None) and torch.isfinite(half(images.bfloat16()).logits).all()
    half.save_pretrained(tmp_path / "half")
    assert type(model).from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    mapped = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert_equal_outputs(model(images), mapped(images))
    with torch.device("cpu"):
        assert equal_states(model, type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_building_on_the_meta_device(kind: str) -> None:
    model = model_of(kind)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert {value.device.type for value in empty.parameters()} == {"meta"}
    assert [(k, v.shape) for k, v in empty.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]
    assert empty.levels == model.levels


@pytest.mark.parametrize("kind", FEW)
def test_another_number_of_classes(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=5)
    again = type(model).from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert again.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    old, new = model.state_dict(), again.state_dict()
    changed = {key for key in old if old[key].shape != new[key].shape}
    assert changed and all(torch.equal(old[key], new[key]) for key in old if key not in changed)
    assert all(torch.isfinite(new[key]).all() for key in changed)
    assert torch.isfinite(again(**inputs_of(kind)).loss)
    named = type(model).from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert named.config.id2label == {0: "a", 1: "b", 2: "c"} and equal_states(model, named)
    assert type(model).from_pretrained(tmp_path).config.id2label == NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_part(kind: str) -> None:
    model, inputs = model_of(kind).train(), inputs_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(**inputs).loss.backward()
    optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"backbone", "neck", "head"} - ({"neck"} if model.config.neck == "none" else set())


@pytest.mark.parametrize("kind", ["retinanet_resnet", "fcos_dinov2", "faster_rcnn_resnet", "reppoints_resnet"])
@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_detector_names_the_command(kind: str, strict: bool) -> None:
    model, images = model_of(kind), inputs_of(kind)["pixel_values"]
    with pytest.raises(Exception, match=r"python -m cankd_hf\.export FOLDER") as caught:
        torch.export.export(model, (images,), strict=strict)
    if not strict:
        assert isinstance(caught.value, NotImplementedError) and "\n" not in str(caught.value)
    with pytest.raises(NotImplementedError, match=r"python -m cankd_hf\.export FOLDER"):
        torch.jit.trace(model, (images,))


def test_exporting_a_segmentation_model() -> None:
    model, images = model_of("resnet_fpn"), inputs_of("resnet_fpn")["pixel_values"]
    program = torch.export.export(model, (images,))
    assert_equal_outputs(program.module()(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_compiled_training(kind: str) -> None:
    model, inputs = model_of(kind).train(), inputs_of(kind)
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch._dynamo.reset()
        torch.manual_seed(0)
        expected = model(**inputs).loss
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        torch.manual_seed(0)
        loss = compiled(**inputs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        loss.backward()
    torch._dynamo.reset()


def test_loading_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    model_of("resnet_fpn").save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        type(model_of("resnet_fpn")).from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
