"""A student as an ONNX file, checked against PyTorch, and run without torch. Needs onnx, onnxruntime, onnxscript."""

import numpy as np
import onnxruntime

from cankd_hf import CanKDConfig, CanKDTrainer, export
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.tasks import SegmentationTask

STEPS = 40

generated = {"train": 64, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
args = CanKDConfig("runs/export", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
trainer = CanKDTrainer(student, None, args, task=task, train_dataset=data.train)
trainer.train()
trainer.save_model()
# The same as the command `cankd export runs/export --size 64 64 --no-latency`.
code = export.main(["runs/export", "--size", "64", "64", "--no-latency", "--overwrite"])
assert code == 0, "the message above says why"
session = onnxruntime.InferenceSession("runs/export/onnx/model.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"pixel_values": np.zeros((2, 3, 64, 64), dtype=np.float32)})
print("logits", logits.shape)
