"""Files in float16 and int8: how close they are, what they are calibrated on, and the table of all forms."""

from __future__ import annotations

import contextlib
import errno
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.errors import InputError
from cankd_hf.evaluate import main as evaluate
from cankd_hf.export import command, main
from cankd_hf.export.images import Images, calibrating, calibration_images, digests
from cankd_hf.export.job import Written
from cankd_hf.export.source import Source, load
from cankd_hf.export.teachers import teachers_of
from cankd_hf.tasks import TASKS
from cankd_hf.tasks.detection_outputs import detections
from cankd_hf.tasks.export_forms import DetectionsForm, PixelsForm

from ..models.kinds import RESNET, SMALL
from .test_export import EVERY_KIND, SIZE, made, saved, talkative

onnxruntime = pytest.importorskip("onnxruntime")
DATA = {"path": "shapes", "test_split": "test", "image_size": [64, 64]}
DATA |= {"generated": {"train": 24, "validation": 8, "test": 10, "size": 64}}
THREE = ["float32", "float16", "int8"]


def learned(steps: int, seed: int) -> Any:
    """A tiny segmentation student that has seen the generated shapes."""
    config = DataConfig(**DATA)
    task, data = TASKS["segmentation"].from_data(config, splits=("train",))
    torch.manual_seed(seed)
    data.train.transform = task.eval_transform(config)
    model = task.build_student(_student())
    batch = task.collate([data.train[index] for index in range(24)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _student() -> Any:
    from cankd_hf.config.student import StudentConfig

    return StudentConfig(backbone=RESNET, fpn=SMALL)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, list[torch.Tensor]]:
    """A run with two teachers, the report of its export in three types, the output, and the calibration's images."""
    root = tmp_path_factory.mktemp("run")
    for name, steps in {"student": 70, "big": 5, "small": 0}.items():
        saved(learned(steps, len(name)), root / name)
    config = {"do_resize": True, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.3, 0.3, 0.3]}
    (root / "small" / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = {
        "task": "segmentation",
        "output_dir": str(root / "student"),
        "data": DATA,
        "student": {"backbone": RESNET, "fpn": SMALL},
        "teachers": {name: {"model": str(root / name)} for name in ("big", "small")},
        "distill": {"terms": [{"loss": "cankd", "teacher": name, "name": name} for name in ("big", "small")]},
    }
    stats = {"size": {"height": 64, "width": 64}}
    stats |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (root / "student" / "preprocessor_config.json").write_text(json.dumps(stats), encoding="utf-8")
    (root / "student" / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    seen: list[torch.Tensor] = []

    def recorded(*args: Any) -> Any:
        for image in calibrating(*args):
            seen.append(image)
            yield image

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(command, "calibrating", recorded)
        argv = [str(root / "student"), "--dtype", "fp32", "fp16", "int8", "--runs", "1"]
        assert main([*argv, "--size", "96", "64"]) == 0
    report = json.loads((root / "student" / "onnx" / "export.json").read_text(encoding="utf-8"))
    return root / "student", report, printed.getvalue(), seen


def test_each_type_is_as_close_as_its_rounding(three: tuple[Path, dict[str, Any], str, list[torch.Tensor]]) -> None:
    rows = {row.get("dtype"): row for row in three[1]["forms"]}
    assert rows["float32"]["largest_error"] < 1e-4 and rows["float32"]["equal"] == 1
    assert 0 < rows["float16"]["largest_error"] < 0.05 and rows["float16"]["equal"] > 0.99
    assert rows["float16"]["largest_error"] < rows["int8"]["largest_error"] and 0.9 < rows["int8"]["equal"] < 1
    assert rows["float16"]["bytes"] < 0.8 * rows["float32"]["bytes"]
    student = next(row for row in three[1]["forms"] if row["form"] == "student, PyTorch")["scores"]
    exact = student["miou"]
    found = [name for name, value in student.items() if name.startswith("iou_") and (value or 0) > 0.05]
    assert len(found) > 1  # it has learned something that could be lost
    for name, most in {"float32": 1e-4, "float16": 0.01, "int8": 0.05}.items():
        assert abs(rows[name]["scores"]["miou"] - exact) < most, name


def test_files_keep_inputs_outputs_and_dynamic_sizes(
    three: tuple[Path, dict[str, Any], str, list[torch.Tensor]],
) -> None:
    folder = three[0] / "onnx"
    import onnx

    for name, dtype in {"model.onnx": "float32", "model_fp16.onnx": "float16", "model_int8.onnx": "int8"}.items():
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        assert (given.type, made.type) == ("tensor(float)", "tensor(float)")
        for shape in ((3, 3, 64, 64), (2, 3, 101, 75)):
            assert session.run(None, {"pixel_values": np.zeros(shape, np.float32)})[0].shape[0] == shape[0]
        facts = session.get_modelmeta().custom_metadata_map
        assert facts["dtype"] == dtype and len(json.loads(facts["classes"])) == 6
        assert str(Path(__file__).parents[2]).encode() not in (folder / name).read_bytes()
    whole = onnx.load(folder / "model_int8.onnx")
    assert [opset.domain for opset in whole.opset_import] == [""]  # other runtimes refuse sets they do not know
    graph = whole.graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert weights and set(weights.values()) == {onnx.TensorProto.INT8}


def test_the_table_has_every_teacher_and_the_scores_of_evaluate(
    three: tuple[Path, dict[str, Any], str, list[torch.Tensor]], tmp_path: Path
) -> None:
    folder, report, printed, _ = three
    names = [row["form"] for row in report["forms"]]
    runtime = [f"student, ONNX Runtime, {dtype}" for dtype in THREE]
    assert names == ["teacher big, PyTorch", "teacher small, PyTorch", "student, PyTorch", *runtime]
    assert set(report["measured"]["latency"]) == set(names)
    card = (folder / "onnx" / "export.md").read_text(encoding="utf-8")
    for row in report["forms"]:
        assert f"{row['scores']['miou']:.4f}" in card and row["form"] in card and row["form"] in printed
    scores = {}
    for name in ("student", "big", "small"):
        argv = [str(folder.parent / name), "--json", str(tmp_path / f"{name}.json")]
        own = [] if name == "student" else [f"data.{key}={json.dumps(value)}" for key, value in DATA.items()]
        stats = json.loads((folder.parent / name / "preprocessor_config.json").read_text(encoding="utf-8"))
        own += [] if name == "student" else [f"data.{key}={stats[key]}" for key in ("image_mean", "image_std")]
        assert evaluate([*argv, *own, "--split", "test"]) == 0
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["miou"]
    found = [row["scores"]["miou"] for row in report["forms"][:3]]
    assert found == pytest.approx([scores["big"], scores["small"], scores["student"]], abs=1e-3)


def test_calibration_sees_training_images_and_none_that_are_scored(
    three: tuple[Path, dict[str, Any], str, list[torch.Tensor]],
) -> None:
    task, config = TASKS["segmentation"], DataConfig(**DATA)
    _, data = task.from_data(config, splits=("train", "test"))
    data.train.transform = task.eval_transform(config)
    split = {
        name: {item["pixel_values"].numpy().tobytes() for item in part}
        for name, part in {"train": data.train, "test": data.test}.items()
    }
    used = {image[0].numpy().tobytes() for image in three[3]}
    assert used == split["train"] and not used & split["test"]
    assert three[1]["calibration"] == {"images": 24, "source": "train"}


def test_scored_images_are_left_out_of_a_calibration() -> None:
    config = DataConfig(**DATA)
    kind = TASKS["segmentation"]
    task, data = kind.from_data(config, splits=("eval", "test"))
    tests, both = (Images(task, part, "x", config) for part in (data.test, [*data.eval, *data.test]))
    apart = digests(tests)
    left = list(calibrating(both, 18, apart))
    assert len(left) == 8 and len(apart) == 10
    with pytest.raises(InputError, match="got 0 of x, and 10 that are scored too"):
        list(calibrating(tests, 10, apart))


def test_folders_to_calibrate_on(tmp_path: Path) -> None:
    source = Source("s", "segmentation", made("resnet_fpn").eval())
    config = DataConfig(path=".", image_size=[32, 48])
    for index in range(9):
        Image.fromarray(np.full((20 + index, 30, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    images = calibration_images(source, config, str(tmp_path))
    assert {batch["pixel_values"].shape for batch in images.batches()} == {(1, 3, 32, 48)}
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=rf"images of {tmp_path.name}: 4\.png"):
        list(calibrating(images, 9, set()))
    tolerant = calibration_images(source, replace(config, on_error="skip"), str(tmp_path))
    assert len(list(calibrating(tolerant, 9, set()))) == 9
    for index in range(3):
        (tmp_path / f"{index}.png").unlink()
    with pytest.raises(InputError, match="expected at least 8 images to calibrate int8 on, got 6"):
        calibration_images(source, config, str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--calibrate .*empty: data.path: expected images"):
        calibration_images(source, config, str(tmp_path / "empty"))


def test_a_refused_export_leaves_nothing(
    three: tuple[Path, dict[str, Any], str, list[torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    saved(made("resnet_fpn"), folder)
    before = sorted(folder.rglob("*"))
    assert main([str(folder), "--dtype", "int8"]) == 2  # neither data nor images to calibrate on
    assert "data.path" in capsys.readouterr().err
    few = [str(three[0]), "--dtype", "int8", "--calibrate", str(tmp_path), "--output", str(tmp_path / "a" / "b")]
    assert main(few) == 2 and not (tmp_path / "a").exists()
    wrong = "data.generated={train: 4}"
    assert main([*few[:3], "--output", str(tmp_path / "a"), wrong]) == 2
    assert "expected at least 8 images" in capsys.readouterr().err
    assert main([str(three[0]), "--dtype", "int8", "--output", str(three[0] / "onnx" / "model.onnx")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before and not (tmp_path / "a").exists()


def test_folders_and_disks_that_take_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="--output: .*file/below cannot be written to"),
        command._folder(tmp_path / "file" / "below"),
    ):
        pass
    saved(made("resnet_fpn"), tmp_path / "s")
    wanted = [str(tmp_path / "s"), "--no-latency", "--size", "64", "64", "--output", str(tmp_path / "made")]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.onnx.ONNXProgram.save", full)
    assert main(wanted) == 1 and not (tmp_path / "made").exists()
    assert "free space on the disk" in capsys.readouterr().err


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("x", "--dtype", "data.path=y"): "got none",
        ("x", "--dtype", "int8", "--format", "torch-export"): "int8 is written as ONNX only",
        ("x", "--calibrate", str(tmp_path)): "--calibrate: only int8 is calibrated",
        ("x", "--dtype", "int8", "--calibrate", "nowhere"): "expected a folder of images, got nowhere",
        ("x", "--dtype", "int8", "--calibration-images", "3"): "--calibration-images: expected at least 8, got 3",
        ("x", "--no-scores", "--split", "test"): "--no-scores: contradicts --split test",
        ("x", "data.path=y"): "data.path=y: no data set is read for this export",
    }
    for argv, message in cases.items():
        assert main(list(argv)) == 2
        assert message in capsys.readouterr().err


def test_outputs_of_a_file_are_scored_as_the_students() -> None:
    torch.manual_seed(0)
    source = Source("x", "detection", talkative("fcos_resnet"))
    form, images = source.form(), torch.randn(2, 3, 96, 128)
    assert isinstance(form, DetectionsForm)
    with torch.no_grad():
        output = source.model(pixel_values=images)
    plain = form.read(output)
    sizes = torch.tensor([[96.0, 128.0], [48.0, 64.0]])
    for ours, theirs in zip(
        detections(form.as_output(plain), sizes, "cankd_fpn"), detections(output, sizes, "cankd_fpn"), strict=True
    ):
        assert len(ours["scores"]) == len(theirs["scores"]) > 10
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.allclose(ours["scores"], theirs["scores"]) and torch.allclose(
            ours["boxes"], theirs["boxes"], atol=1e-3
        )


def test_agreement_counts_what_both_have() -> None:
    logits = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]]]])
    form = PixelsForm.__new__(PixelsForm)
    found = form.agreement([logits], [logits + torch.tensor([0.5, -3.0])])
    assert (found.largest, found.total, found.values) == (3.0, 7.0, 4)
    assert (found.equal, found.parts) == (2.0, 2)
    assert form.agreement([logits], [logits.flip(1)]).equal == 0
    boxes = DetectionsForm.__new__(DetectionsForm)
    one = [torch.tensor([[0.9, 0.5, 0.0]]), torch.tensor([[1, 0, -1]]), torch.tensor([[[0.1, 0.1, 0.4, 0.4]] * 3])]
    other = [torch.tensor([[0.88, 0.0, 0.0]]), torch.tensor([[1, -1, -1]]), one[2].clone()]
    both = boxes.agreement(one, other) + boxes.agreement(one, one)
    assert both.largest == pytest.approx(0.02) and (both.equal, both.parts) == (2 + 4, 3 + 4)


def test_an_export_replaces_all_files_of_the_one_before(tmp_path: Path) -> None:
    aside, target = tmp_path / "aside", tmp_path / "out"
    for folder in (aside / "float32", target):
        folder.mkdir(parents=True)
    for name in ("model.onnx", "model_int8.onnx", "notes.txt"):
        (target / name).write_text("old")
    (aside / "float32" / "model.onnx").write_text("new")
    written = [Written("float32", aside / "float32" / "model.onnx", None, [], {})]  # type: ignore[arg-type]
    command._move(written, {"export.md": "table"}, aside, target, {"model.onnx", "model_int8.onnx"})
    found = {file.name: file.read_text() for file in target.iterdir()}
    assert found == {"model.onnx": "new", "export.md": "table", "notes.txt": "old"}


def test_a_teacher_that_is_gone_is_named(
    three: tuple[Path, dict[str, Any], str, list[torch.Tensor]], tmp_path: Path
) -> None:
    recipe = json.loads((three[0] / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["teachers"]["big"]["model"] = str(tmp_path / "gone")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    source = load(str(three[0]))
    found, notes = teachers_of(Source(str(tmp_path), "segmentation", source.model, source.preprocessor))
    assert [one.name for one in found] == ["teacher small"] and found[0].unscored is None
    assert len(notes) == 1 and notes[0].startswith("teacher big: left out, it cannot be loaded")
    recipe["teachers"] = {"small": {"model": None, "config": RESNET}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # its terms name another teacher
    found, notes = teachers_of(Source(str(tmp_path), "segmentation", source.model, source.preprocessor))
    assert not found and "expected one of small, got 'big'" in notes[0]
    recipe["distill"] = {"terms": [{"loss": "cankd"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    notes = teachers_of(Source(str(tmp_path), "segmentation", source.model, source.preprocessor))[1]
    assert notes == ["teacher: left out, it cannot be loaded (its weights were random)."]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_in_int8(kind: str, tmp_path: Path) -> None:
    folder = saved(made(kind), tmp_path / "s")
    noise = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(8):
        picture = noise.integers(0, 256, (160, 192, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
    argv = ["--dtype", "float32", "int8", "--calibrate", str(tmp_path / "images"), "--no-scores"]
    assert main([str(folder), *argv, *SIZE]) == 0
    rows = json.loads((folder / "onnx" / "export.json").read_text(encoding="utf-8"))["forms"]
    print(f"INT8 {kind} {rows[-1]['equal_of']} {rows[-1]['equal']} {rows[-1]['bytes'] / rows[-2]['bytes']:.2f}")


def test_load_gives_what_the_table_names(three: tuple[Path, dict[str, Any], str, list[torch.Tensor]]) -> None:
    rows = {row["form"]: row for row in three[1]["forms"]}
    assert rows["student, PyTorch"]["parameters"] == load(str(three[0])).model.num_parameters()
