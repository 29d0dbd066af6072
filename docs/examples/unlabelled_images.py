"""Images without labels: half of every batch, on which the student learns from the teacher alone."""

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.tasks import SegmentationTask

STEPS = 40

config = DataConfig(
    path="shapes",  # a folder, a Hub id, a parquet file
    unlabelled="shapes",  # the same, without masks; in a recipe: data.unlabelled
    generated={"train": 16, "validation": 8, "test": 8, "unlabelled": 64, "size": 64},
    image_size=[64, 64],
    strong=StrongConfig(cutmix=0.5),  # what only the student sees: colours, blur, CutMix, erasing
)
task, data = SegmentationTask.from_data(config)
backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
teacher = TeacherConfig(config={"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2})
args = CanKDConfig("runs/unlabelled", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
both = WithUnlabelled(data.train, data.unlabelled, ratio=1.0)
trainer = CanKDTrainer(student, teacher, args, task=task, train_dataset=both, eval_dataset=data.eval)
trainer.train()
print(trainer.evaluate())
