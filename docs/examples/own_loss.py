"""A loss of your own: a class with `compute(student, teacher)`, used like those that come with the package."""

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.losses import FeatureLoss
from cankd_hf.tasks import SegmentationTask

STEPS = 40


class Charbonnier(FeatureLoss):
    """Mean of sqrt(difference^2 + eps^2) of two maps [B, C, H, W]; connectors have brought both to one shape."""

    def __init__(self, channels, eps=0.01):
        super().__init__(channels)
        self.eps = eps

    def compute(self, student, teacher):
        return ((student - teacher).square() + self.eps**2).sqrt().mean()


generated = {"train": 64, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
teacher = TeacherConfig(config={"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2})
terms = [LossTerm(Charbonnier, weight=0.5, options={"eps": 0.001})]
args = CanKDConfig("runs/own_loss", max_steps=STEPS, per_device_train_batch_size=8, report_to="none", logging_steps=10)
trainer = CanKDTrainer(student, teacher, args, terms=terms, task=task, train_dataset=data.train)
trainer.train()
print([entry["loss_Charbonnier"] for entry in trainer.state.log_history if "loss_Charbonnier" in entry])
