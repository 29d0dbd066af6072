"""Every native detector of transformers is a student and a teacher of the detection task like any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer, GroundingDinoProcessor, set_seed
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import input_rule
from cankd_hf.models.prompts import PROMPTED, phrase_probabilities, read_prompt, text_input
from cankd_hf.tasks import DetectionTask, TaskData, task_for
from cankd_hf.tasks.detection_outputs import SOFTMAX, detections
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.checkpoint import read_student_weights
from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import forked

from .detection_folders import write_boxes
from .native_detector_configs import FAMILIES, PYRAMID, RESNET, config, write_tokenizer

# Families whose image processor no table of transformers names: their checkpoints do.
NAMED_BY_CHECKPOINTS = {
    **dict.fromkeys(("rt_detr_v2", "d_fine"), "RTDetrImageProcessor"),
    "dab-detr": "ConditionalDetrImageProcessor",
}
# Those that share their code with another family are left to `-m slow`.
COPIES = ("rt_detr_v2", "dab-detr", "table-transformer", "mm-grounding-dino")
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in COPIES else []) for name in FAMILIES]
# Neither side is a multiple of anything, and training batches come in all sizes, padded.
DATA = {"image_size": [60, 90], "scale": [0.8, 1.2]}
FCOS = {"head": "fcos", "head_layers": 1, "fpn_channels": 16}


@dataclass
class Run:
    """One family after one step of distillation, and its score, saved."""

    trainer: CanKDTrainer
    before: dict[str, Tensor]
    scores: dict[str, float]
    folder: Path
    outputs: dict[str, Tensor]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="session")
def data(folder: Path) -> tuple[DetectionTask, TaskData]:
    return DetectionTask.from_data(DataConfig(path=str(write_boxes(folder / "boxes", 4, 2)), **DATA))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> str:
    return str(write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="session")
def fcos() -> Teacher:
    set_seed(1)
    return load_teacher(TeacherConfig(config={"model_type": "cankd_fpn", "backbone_config": RESNET, **FCOS}))


def train(
    data: tuple[DetectionTask, TaskData], config: StudentConfig, teacher: Teacher, folder: Path
) -> tuple[CanKDTrainer, dict[str, Tensor]]:
    """One step of distillation through the task; also the student's weights before it."""
    set_seed(0)
    task, sets = DetectionTask(data[0].id2label), data[1]
    student = task.build_student(config)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    trainer = CanKDTrainer(
        student,
        teacher,
        CanKDConfig(str(folder), **settings),
        task=task,
        train_dataset=sets.train,
        eval_dataset=sets.eval,
        processing_class=task.for_model(student).image_processor(DataConfig(**DATA)),
    )
    trainer.train()
    return trainer, before


@pytest.fixture(scope="session")
def run(folder: Path, data: Any, tokenizer: str, fcos: Teacher) -> Callable[[str], Run]:
    """The run of a family, made when first asked for."""
    runs: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in runs:
            own = StudentConfig(config=config(name), tokenizer=tokenizer if name in PROMPTED else None)
            trainer, before = train(data, own, fcos, folder / name)
            scores = trainer.evaluate()
            trainer.save_model(str(folder / name))
            pixels = torch.randn(1, 3, 64, 96)
            with torch.no_grad():
                outputs = trainer.student.eval()(pixel_values=pixels)
            kept = {key: outputs[key] for key in ("logits", "pred_boxes", "input_ids") if key in outputs}
            save_file({"pixel_values": pixels, **kept}, folder / name / "expected.safetensors")
            runs[name] = Run(trainer, before, scores, folder / name, kept)
        return runs[name]

    return get


@pytest.mark.parametrize("name", EACH)
def test_one_step_then_a_score(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    logged = made.trainer.state.log_history[0]
    assert logged["loss_cankd"] > 0 and logged["loss_task"] > 0 and math.isfinite(logged["loss"])
    assert math.isfinite(made.scores["eval_ap"]) and math.isfinite(made.scores["eval_loss"])
    after = made.trainer.student.state_dict()
    moved = [key for key, value in made.before.items() if not torch.equal(value, after[key])]
    # Not the very first: DETR and its kin freeze the stem and the first stage.
    assert any(after[key].ndim == 4 for key in moved) and any("bbox" in key or "class" in key for key in moved)
    levels = made.trainer.distiller.taps.levels((128, 128))
    assert [round(level.stride) for level in levels] == FAMILIES[name][1]
    batch = next(iter(made.trainer.get_train_dataloader()))
    assert "pixel_mask" in batch
    # A checkpoint holds the names of published checkpoints; read back, they are the student's own.
    read = read_student_weights(made.folder)
    tied = set(made.trainer.student.all_tied_weights_keys or ())
    assert read.keys() - tied == after.keys() - tied
    assert all(torch.equal(value, after[key]) for key, value in read.items())
    rule = input_rule(made.trainer.student)
    assert not rule.strict or all(side % rule.multiple == 0 for side in batch["pixel_values"].shape[-2:])


@pytest.mark.parametrize("name", EACH)
def test_it_teaches_too(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    teacher = load_teacher(str(made.folder))
    ran: list[str] = []
    for path, module in teacher.model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path))
    images = torch.randn(2, 3, 128, 128)
    maps = teacher(images)
    last = [module for module in teacher.taps.modules if f"{ran[-1]}.".startswith(f"{module}.")]
    assert last, f"{ran[-1]} started after the last tap"
    levels = teacher.levels((128, 128))
    assert [(len(m), m.shape[1], tuple(m.shape[2:])) for m in maps] == [(2, at.channels, at.size) for at in levels]
    # They are what the student itself computes, with whatever text it reads.
    distiller = made.trainer.distiller
    with torch.no_grad():
        distiller.student.eval()(pixel_values=images)
    for one, other in zip(maps, distiller.taps.collect((128, 128)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in FAMILIES if name not in COPIES], id="most"),
        pytest.param(COPIES, id="copies", marks=pytest.mark.slow),
    ],
)
def test_saved_students_need_no_cankd_hf(names: list[str], run: Callable[[str], Run], tmp_path: Path) -> None:
    folders = [str(run(name).folder) for name in names]
    done = forked([Path(__file__).with_name("without_cankd_hf.py"), *folders], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert sorted(results) == sorted(names)
    failed = {name: found for name, found in results.items() if isinstance(found, str) or found[0] > 1e-6}
    assert not failed
    assert all(count > 0 for _, count in results.values())


@pytest.mark.parametrize("name", [each for each in EACH if each.values[0] not in PROMPTED])
def test_detections_are_those_of_the_familys_own_image_processor(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    outputs = transformers.utils.ModelOutput(made.outputs)
    kind = NAMED_BY_CHECKPOINTS.get(name) or IMAGE_PROCESSOR_MAPPING_NAMES[name]
    processor = getattr(transformers, kind if isinstance(kind, str) else kind["torchvision"])()
    sizes = torch.tensor([[60, 80]])
    (theirs,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    (ours,) = detections(outputs, sizes, name)
    scores = ours["scores"]
    if name in SOFTMAX:  # their processors keep the best class of each query alone; ours every pair, as COCO scores
        assert len(theirs["scores"]) == 12 and len(scores) == 36
    for score, label, box in zip(theirs["scores"], theirs["labels"], theirs["boxes"], strict=True):
        same = ((scores - score).abs() < 1e-6) & (ours["labels"] == label)
        assert (same & ((ours["boxes"] - box).abs().amax(1) < 1e-3)).any()


@pytest.mark.parametrize(
    ("teaches", "learns", "pairs"),
    [
        ("rt_detr", "fcos", [(0, 0), (1, 1), (2, 2)]),
        ("fcos of three levels", "retinanet", [(0, 0), (1, 1), (2, 2)]),
        ("fcos of four levels", "retinanet", [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ],
)
def test_pairs_of_unlike_detectors(
    teaches: str, learns: str, pairs: list[tuple[int, int]], run: Callable[[str], Run], data: Any, tmp_path: Path
) -> None:
    pyramid = {"model_type": "cankd_fpn", "backbone_config": RESNET, **FCOS}
    if teaches == "rt_detr":
        teacher = load_teacher(str(run("rt_detr").folder))
    else:
        taps = [f"neck:{level}" for level in range(len(pairs))]
        teacher = load_teacher(TeacherConfig(config=pyramid, taps=taps))
    student = StudentConfig(backbone=RESNET, fpn={**FCOS, "fpn_channels": 8, "head": learns})
    trainer, before = train(data, student, teacher, tmp_path)
    assert [item.pair for item in trainer.distiller.placed] == pairs
    assert trainer.state.log_history[0]["loss_cankd"] > 0
    after = trainer.student.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items() if key.startswith("backbone."))


def test_the_prompt_is_that_of_the_stock_processor(tokenizer: str) -> None:
    names = ["Red blood cell", "platelets", "BLUE"]
    own = BertTokenizer.from_pretrained(tokenizer)
    processor = GroundingDinoProcessor(transformers.GroundingDinoImageProcessor(), own)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stock = processor(images=image, text=names, return_tensors="pt")
    ours = read_prompt(own, names, 32)
    assert all(torch.equal(ours[key], stock[key]) for key in ("input_ids", "attention_mask", "token_type_ids"))
    assert torch.equal(read_prompt(own, ["red_blood_cell", "platelets?", "blue"], 32)["input_ids"], stock["input_ids"])
    # A class is rated by the mean over the tokens of its phrase: 3, 2 and 1 of them here.
    logits = torch.randn(1, 5, 32)
    logits[..., ours["input_ids"].shape[1] :] = -math.inf
    each = logits[0].sigmoid()
    expected = torch.stack([each[:, 1:4].mean(1), each[:, 5:7].mean(1), each[:, 8]], dim=1)
    torch.testing.assert_close(phrase_probabilities(logits, ours["input_ids"])[0], expected)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["red", "RED "], "2 different phrases"),
        (["red", "?"], "2 different phrases"),
        (["red cell"] * 20, "62 tokens, the model reads 32"),
    ],
)
def test_prompts_that_cannot_be_told_apart_are_refused(names: list[str], said: str, tokenizer: str) -> None:
    with pytest.raises(InputError, match=said):
        read_prompt(BertTokenizer.from_pretrained(tokenizer), names, 32)


def test_a_prompt_without_a_tokenizer_is_refused(data: Any, tmp_path: Path) -> None:
    task = DetectionTask(data[0].id2label)
    for given in (None, str(tmp_path)):
        with pytest.raises(InputError, match=r"student\.tokenizer"):
            task.build_student(StudentConfig(config=config("grounding-dino"), tokenizer=given))


def test_a_tokenizer_for_a_student_that_reads_no_text_is_refused(data: Any, tokenizer: str) -> None:
    with pytest.raises(InputError, match=r"student\.tokenizer"):
        DetectionTask(data[0].id2label).build_student(StudentConfig(config=config("detr"), tokenizer=tokenizer))


def test_a_prompted_student_goes_on_from_a_folder(run: Callable[[str], Run], data: Any) -> None:
    made = run("grounding-dino")
    task = DetectionTask(data[0].id2label)
    model = task.build_student(StudentConfig(model=str(made.folder)))
    assert torch.equal(text_input(model).text["input_ids"], made.outputs["input_ids"])
    assert all(torch.equal(value, made.trainer.student.state_dict()[key]) for key, value in model.state_dict().items())


def test_omdet_turbo_teaches_without_a_text() -> None:
    text = {"model_type": "clip_text_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"encoder_in_channels": [8, 16, 16], "vision_features_channels": [32] * 3, "decoder_num_layers": 1}
    sizes |= {"encoder_hidden_dim": 32, "decoder_hidden_dim": 32, "apply_layernorm_after_vision_backbone": False}
    sizes |= {"encoder_attention_heads": 2, "decoder_num_heads": 2, "encoder_dim_feedforward": 16, "num_queries": 5}
    fields = {"model_type": "omdet-turbo", "backbone_config": PYRAMID, "text_config": text, **sizes}
    teacher = load_teacher(TeacherConfig(config=fields))
    assert [tuple(m.shape) for m in teacher(torch.randn(2, 3, 60, 90))] == [(2, 32, 8 >> i, 12 >> i) for i in range(3)]


def test_the_backbone_of_a_native_student_learns_at_its_own_rate(run: Callable[[str], Run]) -> None:
    trainer = run("rt_detr").trainer
    trainer.optimizer, trainer.args.backbone_lr_scale = None, 0.1
    try:
        groups = trainer.create_optimizer().param_groups
    finally:
        trainer.args.backbone_lr_scale = 1.0
    slow = {id(p) for group in groups for p in group["params"] if group["lr"] < trainer.args.learning_rate / 2}
    assert slow == {id(p) for p in trainer.student.model.backbone.parameters() if p.requires_grad}


def test_a_saved_prompted_student_finds_its_task(run: Callable[[str], Run], data: Any, tmp_path: Path) -> None:
    made = run("grounding-dino")
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(made.folder)
    task = task_for(model)
    assert isinstance(task, DetectionTask) and text_input(model) is not None
    assert task.pipeline_tag == "zero-shot-object-detection"
    args = CanKDConfig(str(tmp_path), per_device_eval_batch_size=8, use_cpu=True, report_to="none")
    scores = CanKDTrainer(model, None, args, eval_dataset=data[1].eval).evaluate()
    assert scores["eval_ap"] == pytest.approx(made.scores["eval_ap"], abs=1e-6)
    assert scores["eval_loss"] == pytest.approx(made.scores["eval_loss"], rel=1e-4)
    # Without class names it is no detector of fixed classes, and without a text it sees images alone.
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert not DetectionTask.accepts(model)


@pytest.mark.slow
def test_grounding_dino_learns_images_by_heart(data: Any, tokenizer: str, tmp_path: Path) -> None:
    """Its classes are words of a prompt: only learning shows that the right word is asked for."""
    fields = config("grounding-dino")
    fields |= {"d_model": 64, "num_queries": 20, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    fields |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "fusion_dropout"), 0.0)
    fields["backbone_config"] = {**PYRAMID, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]}
    fields["text_config"] = {**fields["text_config"], "hidden_size": 32, "hidden_dropout_prob": 0.0}
    task = DetectionTask(data[0].id2label)
    set_seed(0)
    student = task.build_student(StudentConfig(config={**fields, "fusion_droppath": 0.0}, tokenizer=tokenizer))
    images = data[1].eval
    args = CanKDConfig(
        str(tmp_path),
        max_steps=800,
        learning_rate=1.5e-3,
        warmup_steps=0.2,
        per_device_train_batch_size=len(images),
        max_grad_norm=1.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = CanKDTrainer(student, None, args, task=task, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert trainer.evaluate()["eval_ap50"] >= 0.9
