"""torchvision's nets as teachers: their own weights, strictly, and their own maps."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import RetinaNet

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.models import torchvision_teachers
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.inherit import inherit
from cankd_hf.teachers.load import load_teacher

NET = "retinanet_resnet50_fpn"


def untrained(classes: int = 91) -> RetinaNet:
    return get_model(NET, weights=None, weights_backbone=None, num_classes=classes)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights that look like torchvision's: frozen norms, which count no batches, of variances far from 1."""
    torch.manual_seed(0)
    kept = {name: value for name, value in untrained().state_dict().items() if "num_batches" not in name}
    return {name: value * 0.5 if "running_var" in name else value for name, value in kept.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps downloads; nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def no_network(*_: object, **__: object) -> None:
    raise URLError("no network in tests")


def file_of(net: str) -> str:
    return Path(get_model_weights(net).DEFAULT.url).name


def test_torchvisions_weights_give_torchvisions_maps(cache: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, cache / file_of(NET))
    teacher = load_teacher(f"torchvision/{NET}").train()
    original = get_model(NET, weights="DEFAULT").eval()  # frozen norms with epsilon 0
    pixels = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = list(original.backbone(pixels).values())
    found = teacher(pixels)
    assert len(found) == 5
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert [round(level.stride) for level in teacher.levels((96, 64))][:3] == [8, 16, 32]
    assert {level.channels for level in teacher.levels((96, 64))} == {256}
    assert not any(p.requires_grad for p in teacher.parameters()) and not any(m.training for m in teacher.modules())
    assert teacher.stats.mean == tuple(original.transform.image_mean)
    assert teacher.stats.std == tuple(original.transform.image_std)
    manifest = teacher.manifest()
    assert (manifest["model"], manifest["revision"]) == (f"torchvision/{NET}", "COCO_V1")
    assert manifest["taps"] == ["backbone"] and len(manifest["fingerprint"]) == 64
    # other sizes are padded as torchvision pads a batch, never resized, and the cells on the padding left out
    with torch.no_grad():
        padded = original.transform.batch_images([torch.ones(3, 70, 50)], size_divisible=32)
        expected = list(original.backbone(padded).values())
    found = teacher(torch.ones(1, 3, 70, 50))
    assert [tuple(a.shape[-2:]) for a in found] == [(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b[..., : a.shape[-2], : a.shape[-1]])
    named = load_teacher(f"torchvision/{NET}", taps=["backbone.body.layer3"])
    ran: list[str] = []
    for name, module in named.model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
    assert named(pixels)[0].shape == (2, 1024, 6, 4)
    assert not {"backbone.body.layer4", "backbone.fpn", "head"} & set(ran), "stopped at its last tap"
    assert load_teacher(f"torchvision/{NET}", dtype="bfloat16")(pixels)[0].dtype == torch.bfloat16


def test_without_network_or_with_other_weights_one_line_says_what_to_do(
    cache: Path, state: dict[str, torch.Tensor]
) -> None:
    name = f"torchvision/{NET}"
    with pytest.raises(InputError, match=f"are not available .*no network.*or put https://.* at {cache}") as told:
        load_teacher(name)
    assert len(told.value.problems) == 1
    torch.save({key: value for key, value in state.items() if "fpn" not in key}, cache / file_of(NET))
    with pytest.raises(InputError, match=r"do not fit.*Missing.*backbone\.fpn\.inner_blocks\.0\.0\.weight"):
        load_teacher(name)
    (cache / file_of(NET)).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not available"):
        load_teacher(name)
    with pytest.raises(InputError, match="no such detector.*did you mean torchvision/retinanet_resnet50_fpn"):
        load_teacher("torchvision/retinanet_resnet_50_fpn")
    with pytest.raises(InputError, match="teacher.revision: expected one of COCO_V1, got 'main'"):
        load_teacher(name, revision="main")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_local_file_of_another_class_count(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    torch.manual_seed(1)
    mine = untrained(classes=4).eval()
    file = tmp_path / f"mine{ending}"
    if ending == ".pth":
        torch.save(mine.state_dict(), file)
    else:
        save_file(mine.state_dict(), file)
    teacher = load_teacher(TeacherConfig(model=f"torchvision/{NET}", weights=str(file)))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = list(mine.backbone(pixels).values())
    for a, b in zip(teacher(pixels), expected, strict=True):
        assert torch.equal(a, b)
    assert teacher.model.head.classification_head.cls_logits.weight.shape[0] == 4 * 9
    assert teacher.manifest()["revision"] == file.name


def test_a_local_file_that_does_not_fit(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_teachers, "get_model", on_meta)  # refused before any value counts

    def refused(given: object, name: str = "mine.pth") -> str:
        torch.save(given, tmp_path / name)
        with pytest.raises(InputError) as told:
            load_teacher(TeacherConfig(model=f"torchvision/{NET}", weights=str(tmp_path / name)))
        assert len(told.value.problems) == 1
        return str(told.value)

    fewer = {key: value for key, value in state.items() if key != "backbone.body.conv1.weight"}
    assert "1 missing (backbone.body.conv1.weight)" in refused(fewer)
    assert "1 unexpected (ema.step)" in refused({**state, "ema.step": torch.ones(1)})
    wide = {**state, "backbone.body.conv1.weight": torch.zeros(8, 3, 7, 7)}
    assert "1 of another shape (backbone.body.conv1.weight)" in refused(wide)
    assert "its keys are model, epoch" in refused({"model": state, "epoch": 3})
    assert "cannot be read as plain tensors" in refused(io.StringIO("code"))
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps(print))
    for name, reason in (("pickled.pth", "plain tensors"), ("none.pth", "not one"), ("x.bin", "a .safetensors or")):
        (tmp_path / "x.bin").touch()
        with pytest.raises(InputError, match=reason):
            load_teacher(TeacherConfig(model=f"torchvision/{NET}", weights=str(tmp_path / name)))


def on_meta(net: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return get_model(net, **options)


def test_what_a_config_refuses() -> None:
    with pytest.raises(InputError) as told:
        TeacherConfig(model="me/detector", weights="x.pth", fit={}).check()
    assert "teacher.weights: expected `model: torchvision/NAME` beside it" in str(told.value)
    with pytest.raises(InputError, match=r"teacher\.fit: a torchvision net cannot be trained here"):
        TeacherConfig(model=f"torchvision/{NET}", fit={}).check()


def test_a_segmentation_net_gives_the_last_map_of_its_backbone(tmp_path: Path) -> None:
    torch.manual_seed(2)
    name = "deeplabv3_mobilenet_v3_large"
    mine = get_model(name, weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    save_file(mine.state_dict(), tmp_path / "mine.safetensors")
    teacher = load_teacher(f"torchvision/{name}", weights=str(tmp_path / "mine.safetensors"))
    pixels = torch.randn(1, 3, 64, 96)
    (found,) = teacher(pixels)
    with torch.no_grad():
        assert torch.equal(found, mine.backbone(pixels)["out"])


@pytest.mark.parametrize("head", ["retinanet", "fcos", "faster_rcnn"])
def test_a_students_neck_and_head_start_from_torchvisions(head: str) -> None:
    net = {"retinanet": NET, "fcos": "fcos_resnet50_fpn", "faster_rcnn": "fasterrcnn_resnet50_fpn"}[head]
    torch.manual_seed(3)
    theirs = get_model(net, weights=None, weights_backbone=None, num_classes=4)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    classes = 3 if head == "faster_rcnn" else 4  # torchvision's Faster R-CNN counts the background, ours does not
    student = FPNForObjectDetection(FPNConfig(backbone_config=resnet, head=head, fpn_channels=256, num_labels=classes))
    neck, own = inherit(student, torchvision_teachers.TorchvisionNet(theirs), ["neck", "head"])
    assert all("inner_blocks" in name for name in neck.left), "the lateral convolutions read another backbone"
    assert not own.left and own.mark == "head"
    assert neck.mark == f"neck ({len(neck.copied)} of {count(student)} tensors)"
    student.eval(), theirs.eval()
    maps = [torch.randn(1, 256, 64 // s, 64 // s) for s in ((4, 8, 16, 32, 64) if "rcnn" in head else (8, 16, 32, 64))]
    with torch.no_grad():
        if head == "faster_rcnn":
            ours, other = (sum(rpn.head(maps), []) for rpn in (student.head.rpn, theirs.rpn))
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
        else:
            ours, other = student.head.head(maps), theirs.head(maps)
            assert all(torch.equal(ours[key], other[key]) for key in other)


def count(student: FPNForObjectDetection) -> int:
    return sum(name.startswith("neck.") for name in student.state_dict())
