"""Phases: first from the teacher alone, then from the labels alone with a frozen backbone."""

from cankd_hf import CanKDConfig, CanKDTrainer, Phase
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.tasks import SegmentationTask

STEPS = 40

generated = {"train": 64, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
teacher = TeacherConfig(config={"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2})
args = CanKDConfig("runs/phases", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
trainer = CanKDTrainer(student, teacher, args, task=task, train_dataset=data.train, eval_dataset=data.eval)
features = Phase("features", 0.5, distill={"task_weight": 0.0})  # reads no labels
labels = Phase("labels", 0.5, distill={"terms": []}, frozen=["encoder"], training={"learning_rate": 1e-4})
trainer.train_phases([features, labels], resume=True)  # goes on wherever an earlier call stopped
print(trainer.evaluate())
