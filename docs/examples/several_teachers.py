"""Two teachers: each term names the one that it learns from; each runs once for a batch, as far as it is read."""

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.tasks import SegmentationTask

STEPS = 40

generated = {"train": 64, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
resnet = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
narrow = StudentConfig(backbone=resnet, fpn={"fpn_channels": 32, "head_channels": 32})
wide = StudentConfig(backbone=resnet, fpn={"fpn_channels": 96, "head_channels": 96})
dino = TeacherConfig(config={"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2})
terms = [
    LossTerm("cankd", weight=2.0, teacher="dino"),  # on feature maps
    LossTerm("kl", weight=1.0, teacher="segmenter"),  # on logits: both have the same classes
]
args = CanKDConfig("runs/two_teachers", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
teachers = {"dino": dino, "segmenter": task.build_student(wide)}  # yours would be trained, of course
student = task.build_student(narrow)
trainer = CanKDTrainer(student, None, args, teachers=teachers, terms=terms, task=task, train_dataset=data.train)
trainer.train()
print([item.name for item in trainer.distiller.placed])
