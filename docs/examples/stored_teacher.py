"""A stored teacher: its answers are written in the first epochs and read in all later ones, of later runs too."""

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.tasks import SegmentationTask

STEPS = 40

generated = {"train": 32, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
# Two views: after two epochs the same crops and flips come again, and the teacher is not run any more.
cache = CacheConfig(views=2, codec="fp16", folder="runs/answers")
teacher = TeacherConfig(config={"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2}, cache=cache)
args = CanKDConfig(
    "runs/stored_teacher", max_steps=STEPS, per_device_train_batch_size=8, report_to="none", logging_steps=1
)
trainer = CanKDTrainer(student, teacher, args, task=task, train_dataset=data.train)
trainer.train()
hits = [entry["teacher_cache_hits"] for entry in trainer.state.log_history if "teacher_cache_hits" in entry]
print("share of the answers that were read, by step:", hits)
