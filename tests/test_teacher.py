"""Teachers: frozen for good, fed their own kind of image, stopped early, loaded strictly."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.features import Connector, pair_levels
from cankd_hf.features.inputs import IMAGENET_MEAN, IMAGENET_STD, ImageStats
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
SEGFORMER = {
    **{"model_type": "segformer", "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4},
    **{"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
}


def count_calls(model: nn.Module) -> list[str]:
    """Names of the modules that run, in the order in which they start."""
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
    return ran


# ---- frozen


def test_frozen_for_good() -> None:
    teacher = load_teacher(TeacherConfig(config={**DINOV2, "drop_path_rate": 0.3, "hidden_dropout_prob": 0.5}))
    nn.ModuleDict({"teacher": teacher}).train()  # as a careless owner would
    teacher.requires_grad_(True)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.randn(2, 3, 56, 56, requires_grad=True)
    first, second = teacher(pixels), teacher(pixels)
    assert torch.equal(first[0], second[0])
    assert not first[0].requires_grad
    (first[0] * torch.ones(1, requires_grad=True)).sum().backward()  # may be saved for backward
    assert pixels.grad is None


def test_batch_norm_does_not_move() -> None:
    teacher = load_teacher(TeacherConfig(config=RESNET)).train()
    before = copy.deepcopy(teacher.state_dict())
    teacher.levels((64, 64))
    teacher(torch.randn(4, 3, 64, 64) * 5)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_autocast_does_not_reach_it() -> None:
    teacher = load_teacher(TeacherConfig(config=RESNET))
    pixels = torch.randn(1, 3, 64, 64)
    plain = teacher(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        under = teacher(pixels.bfloat16())
    assert under[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(teacher(pixels), plain, strict=True))


def test_own_dtype() -> None:
    teacher = load_teacher(TeacherConfig(config=RESNET), dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher(torch.randn(1, 3, 64, 64))[0].dtype == torch.bfloat16
    assert teacher.float().input_scale.dtype == torch.float32
    assert next(teacher.model.parameters()).dtype == torch.bfloat16, "its dtype stays its own"
    assert load_teacher(TeacherConfig(config=RESNET)).dtype == torch.float32


# ---- stopped early


def test_a_backbone_loses_the_blocks_nobody_reads() -> None:
    torch.manual_seed(1)
    whole = load_teacher(TeacherConfig(config=DINOV2), taps=["stage2", "stage4"])
    torch.manual_seed(1)
    early = load_teacher(TeacherConfig(config=DINOV2), taps=["stage2"])
    ran = count_calls(early.model)
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(early(pixels)[0], whole(pixels)[0])
    assert {"encoder.layer.0", "encoder.layer.1"} <= set(ran) and "encoder.layer.2" not in ran
    assert early.num_parameters() < whole.num_parameters()
    for kind in (RESNET, {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}):
        short = load_teacher(TeacherConfig(config=kind), taps=["stage2"])
        assert [round(level.stride) for level in short.levels((64, 64))] == [8]
        assert len(short.model.encoder.stages) == 2


def test_a_dense_model_stops_at_its_neck() -> None:
    teacher = load_teacher(TeacherConfig(config=SEGFORMER))
    ran = count_calls(teacher.model)
    teacher(torch.randn(1, 3, 64, 64))
    assert ran[-1].startswith("decode_head.linear_projections.3")
    assert not {"decode_head.linear_fuse", "decode_head.classifier"} & set(ran)


def test_a_plain_vit_stops_in_its_middle() -> None:
    teacher = load_teacher(TeacherConfig(config={"model_type": "vit", **VIT, "image_size": 64}), taps=["layers.1"])
    ran = count_calls(teacher.model)
    assert teacher(torch.randn(1, 3, 64, 96))[0].shape == (1, 16, 4, 6)
    assert ran[-1].startswith("layers.1.") and not {"layers.2", "layernorm"} & set(ran)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DINOV2, SEGFORMER, {"model_type": "vit", **VIT, "image_size": 56}])
def test_compiled(config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    plain = load_teacher(TeacherConfig(config=config))
    torch.manual_seed(1)
    compiled = load_teacher(TeacherConfig(config=config, compile=True))
    for _ in range(2):
        pixels = torch.randn(2, 3, 64, 64)
        for a, b in zip(plain(pixels), compiled(pixels), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert compiled.levels((64, 64)) == plain.levels((64, 64))


# ---- its own images


class Camera(nn.Module):
    """Gives back the image it is shown, as a map of stride 1 or `patch`."""

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), ((0.0,) * 3, (1.0,) * 3)]
)
def test_both_see_the_same_picture(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    picture = torch.rand(2, 3, 8, 8)
    teacher = Teacher(Camera(), TeacherConfig(taps=["pool"]), ImageStats(mean, std))

    def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = normalise(mean, std)
    assert torch.allclose(teacher(normalise(IMAGENET_MEAN, IMAGENET_STD))[0], expected, atol=1e-5)
    teacher.set_input_stats((0.1, 0.2, 0.3), (0.5, 0.4, 0.9))
    assert torch.allclose(teacher(normalise((0.1, 0.2, 0.3), (0.5, 0.4, 0.9)))[0], expected, atol=1e-5)
    teacher.set_input_stats(mean, std)
    assert torch.equal(teacher(expected)[0], expected), "nothing to do, nothing done"


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("size", [(224, 224), (448, 672), (230, 190), (250, 333)])
def test_a_mark_stays_where_it_is(patch: int, size: tuple[int, int]) -> None:
    """A bright spot's centre, read off the teacher's map, is within half a cell of where the student has it."""
    model = tr.Dinov2Backbone(
        tr.Dinov2Config(**{**VIT, "num_hidden_layers": 1}, patch_size=patch, image_size=4 * patch)
    )
    teacher = Teacher(model)
    weight = model.embeddings.patch_embeddings.projection.weight
    seen: list[Tensor] = []

    def light(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        seen.append(nn.functional.avg_pool2d(arguments[0], weight.shape[-1]).mean(1)[0])

    model.embeddings.patch_embeddings.projection.register_forward_hook(light)
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    for y, x in ((0.2, 0.3), (0.5, 0.5), (0.83, 0.71)):
        y, x = y * size[0], x * size[1]
        spot = torch.exp(-((rows[:, None] - y) ** 2 + (columns[None] - x) ** 2) / (2 * 12.0**2))
        found = teacher(spot.expand(1, 3, *size))[0]
        cells = seen[-1]
        assert cells.shape == found.shape[-2:]
        cells = cells / cells.sum()
        h, w = cells.shape
        centre_y = float((cells.sum(1) * (torch.arange(h) + 0.5)).sum())
        centre_x = float((cells.sum(0) * (torch.arange(w) + 0.5)).sum())
        assert abs(centre_y - y * h / size[0]) < 0.5
        assert abs(centre_x - x * w / size[1]) < 0.5


def test_strides_count_the_students_pixels() -> None:
    teacher = load_teacher(TeacherConfig(config=DINOV2))
    (level,) = teacher.levels((230, 190))
    assert level.size == (16, 14)
    assert level.stride == pytest.approx((230 / 16 * 190 / 14) ** 0.5)
    (double,) = load_teacher(TeacherConfig(config=DINOV2), scale=2.0).levels((224, 224))
    assert double.size == (32, 32) and double.stride == 7
    (bigger,) = load_teacher(TeacherConfig(config={**DINOV2, "patch_size": 16}), scale=0.01).levels((224, 224))
    assert bigger.size == (1, 1), "never less than one patch"


@pytest.mark.parametrize("size", [(224, 224), (448, 672)])
@pytest.mark.parametrize("kind", [DINOV2, {**DINOV2, "model_type": "dinov2_with_registers", "patch_size": 14}])
def test_patch_14_against_a_pyramid(size: tuple[int, int], kind: dict[str, Any]) -> None:
    teacher = load_teacher(TeacherConfig(config=kind))
    student = load_teacher(TeacherConfig(config=RESNET), taps=["stage2", "stage3", "stage4"])
    ours, theirs = student.levels(size), teacher.levels(size)
    pairs = pair_levels(ours, theirs)
    assert pairs == [(1, 0), (2, 0)]
    pixels = torch.randn(1, 3, *size)
    student_maps, teacher_maps = student(pixels), teacher(pixels)
    for s, t in pairs:
        a, b = Connector(ours[s], theirs[t])(student_maps[s], teacher_maps[t])
        assert a.shape == b.shape == (1, 16, size[0] // 14, size[1] // 14)


# ---- loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as people have them: a plain Dinov2Model, a ViT classifier, a SegFormer, with their processors."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("teachers")
    dinov2 = tr.Dinov2Config(**{k: v for k, v in DINOV2.items() if k != "model_type"})
    models = {
        "dinov2": tr.Dinov2Model(dinov2),
        "vit": tr.ViTForImageClassification(tr.ViTConfig(**VIT, image_size=64)),
        "segformer": tr.SegformerForSemanticSegmentation(
            tr.SegformerConfig(**{k: v for k, v in SEGFORMER.items() if k != "model_type"})
        ),
        "clip": tr.CLIPModel(
            tr.CLIPConfig(vision_config={**VIT, "image_size": 64, "patch_size": 16}, text_config=VIT)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(base / name)
    half = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    half |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (base / "vit" / "preprocessor_config.json").write_text(json.dumps(half))
    bytes_in = {"do_normalize": True, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}
    (base / "segformer" / "preprocessor_config.json").write_text(json.dumps(bytes_in))
    return {name: base / name for name in models}


def test_local_folders(folders: dict[str, Path]) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    dinov2 = load_teacher(folders["dinov2"])
    resized = nn.functional.interpolate(pixels, (70, 70), mode="bilinear", antialias=False)
    model = tr.Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    tokens = model(resized).last_hidden_state[:, 1:]
    assert torch.allclose(dinov2(pixels)[0].flatten(2).transpose(1, 2), tokens, atol=1e-5)
    assert dinov2.stats == ImageStats() and "ImageNet" in dinov2.manifest()["image_stats_from"]

    vit = load_teacher(str(folders["vit"]))
    assert type(vit.model).__name__ == "ViTModel"
    assert vit.stats == ImageStats((0.5,) * 3, (0.5,) * 3, "preprocessor_config.json")

    segformer = load_teacher(folders["segformer"])
    assert len(segformer(pixels)) == 4
    assert segformer.stats.mean == pytest.approx((0.5,) * 3) and segformer.stats.std == pytest.approx((0.2,) * 3)
    assert load_teacher(folders["segformer"], image_mean=[0.1, 0.2, 0.3]).stats.mean == (0.1, 0.2, 0.3)

    clip = load_teacher(folders["clip"])
    assert type(clip.model).__name__ == "CLIPVisionModel"
    assert clip(pixels)[0].shape == (1, 16, 4, 4)


def test_manifest(folders: dict[str, Path]) -> None:
    first, second = load_teacher(folders["vit"]).manifest(), load_teacher(folders["vit"]).manifest()
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert first["model"] == str(folders["vit"]) and first["taps"] == ["layernorm"]
    assert first["fingerprint"] != load_teacher(folders["dinov2"]).manifest()["fingerprint"]


def test_a_ready_teacher_and_a_model_in_memory() -> None:
    teacher = load_teacher(TeacherConfig(config=RESNET))
    assert load_teacher(teacher) is teacher
    with pytest.raises(InputError, match="no options beside a Teacher, got scale"):
        load_teacher(teacher, scale=2.0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2))
    other = load_teacher(model, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert [level.stride for level in other.levels((64, 64))] == [4, 8]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def spoil(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("kind", ["dinov2", "vit", "segformer"])
def test_missing_and_misshapen_weights_are_listed(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folders[kind] / "model.safetensors")
    key = next(name for name, value in tensors.items() if name.endswith("weight") and value.ndim == 4)

    def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name != key}

    def smaller(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[:1].contiguous() if name == key else value for name, value in state.items()}

    for name, change in (("without", without), ("smaller", smaller)):
        with pytest.raises(InputError) as caught:
            load_teacher(spoil(folders[kind], tmp_path / name, change))
        named = key.split(".")[-2] + ".weight" in str(caught.value)
        assert named or (kind, name) == ("dinov2", "smaller")  # transformers names it in its own report above
    with pytest.raises(InputError, match="none|missing"):
        load_teacher(spoil(folders[kind], tmp_path / "empty", lambda state: {"x": torch.zeros(1)}))


def test_wrong_paths(tmp_path: Path, folders: dict[str, Path]) -> None:
    for name in ("nobody/nothing-here", str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(InputError, match="nobody/nothing-here|config.json"):
            load_teacher(name)
    with pytest.raises(InputError, match=r"expected stages among stem, stage1.*, got stage9"):
        load_teacher(folders["dinov2"], taps=["stage9"])
    with pytest.raises(InputError, match="did you mean layers"):
        load_teacher(folders["vit"], taps=["layer.2"])


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ({}, ["exactly one of model and config, got none"]),
        ({"model": "a", "config": RESNET}, ["got model and config"]),
        ({"model": "a", "dtype": "int8", "scale": 0, "taps": []}, ["teacher.taps", "teacher.dtype", "teacher.scale"]),
        ({"model": "a", "image_mean": [1.0], "image_std": [0.0] * 3}, ["teacher.image_mean", "teacher.image_std"]),
    ],
)
def test_bad_options_all_at_once(config: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_teacher(TeacherConfig(**config))
    assert len(caught.value.problems) == len(messages)
    assert all(message in problem for message, problem in zip(messages, caught.value.problems, strict=True))
    with pytest.raises(InputError, match=r"teacher\.tap: no such option"):
        load_teacher("x", tap="auto")


@pytest.mark.slow
def test_offline_from_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """A repository as the Hub's client caches it loads by id with HF_HUB_OFFLINE=1."""
    snapshot = tmp_path / "hub" / "models--team--tiny" / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    for file in folders["vit"].iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    script = (
        "from cankd_hf import load_teacher; t = load_teacher('team/tiny'); m = t.manifest();"
        "print(m['revision'], m['image_mean'], t.levels((64, 96)))"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": root}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert snapshot.name in done.stdout and "[0.5, 0.5, 0.5]" in done.stdout and "size=(4, 6)" in done.stdout


def test_a_folder_with_timms_files_is_a_teacher(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    name = "test_resnet.r160_in1k"
    made = timm.create_model(name.partition(".")[0], pretrained=False)
    config = {"architecture": "test_resnet", "num_classes": 1000, "model_args": {"num_classes": 1000}}
    config["pretrained_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    teacher = load_teacher(str(tmp_path))
    assert teacher.stats.mean == (0.5, 0.5, 0.5) and len(teacher.levels((64, 64))) > 1
    weight = next(iter(made.state_dict().values()))
    assert any(torch.equal(weight, own) for own in teacher.state_dict().values() if own.shape == weight.shape)
