"""Detection: a folder with boxes, a small FCOS student, and a larger detector as its teacher."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.tasks import DetectionTask

STEPS = 40

folder = Path("boxes")  # yours: COCO json, or metadata.jsonl as here; boxes are [left, top, width, height]
for split, count in (("train", 32), ("val", 8)):
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        image, x, y = Image.effect_noise((96, 96), 60).convert("RGB"), 7 * n % 50, 11 * n % 50
        ImageDraw.Draw(image).rectangle((x, y, x + 30, y + 30), fill=("red", "blue")[n % 2])
        image.save(folder / split / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "objects": {"bbox": [[x, y, 30, 30]], "category": [n % 2]}})
    (folder / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
(folder / "labels.json").write_text(json.dumps({"id2label": {"0": "red", "1": "blue"}}))
task, data = DetectionTask.from_data(DataConfig(path=str(folder), eval_split="val", image_size=[96, 96]))
resnet = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=resnet, fpn={"head": "fcos", "fpn_channels": 32}))
teacher = task.build_student(
    StudentConfig(backbone=resnet, fpn={"head": "fcos", "fpn_channels": 64})
)  # train yours first
args = CanKDConfig("runs/detection", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
terms = [LossTerm("cankd", weight=2.0)]
trainer = CanKDTrainer(
    student, teacher, args, terms=terms, task=task, train_dataset=data.train, eval_dataset=data.eval
)
trainer.train()
print(trainer.evaluate())
