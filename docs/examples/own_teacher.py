"""A teacher of your own: any `nn.Module` that takes images; `taps` name the modules whose outputs are compared."""

from itertools import pairwise

from torch import nn

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm, load_teacher
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.tasks import SegmentationTask

STEPS = 40


class MyNetwork(nn.Module):
    """Somebody's model; load your weights into yours."""

    def __init__(self):
        super().__init__()
        widths = pairwise([3, 24, 48, 96, 192])
        self.stages = nn.Sequential(*(nn.Conv2d(a, b, 3, stride=2 if a > 3 else 4, padding=1) for a, b in widths))

    def forward(self, images):
        return self.stages(images).mean(dim=(2, 3))


generated = {"train": 64, "validation": 8, "test": 8, "size": 64}
task, data = SegmentationTask.from_data(DataConfig(path="shapes", generated=generated, image_size=[64, 64]))
backbone = {"model_type": "timm_backbone", "backbone": "mobilenetv3_small_050"}
student = task.build_student(StudentConfig(backbone=backbone, fpn={"fpn_channels": 32, "head_channels": 32}))
teacher = load_teacher(MyNetwork(), taps=["stages.1", "stages.2", "stages.3"])
terms = [LossTerm("cankd", weight=3.0, pairs="auto")]  # levels of equal stride are compared
args = CanKDConfig("runs/own_teacher", max_steps=STEPS, per_device_train_batch_size=8, report_to="none")
trainer = CanKDTrainer(
    student, teacher, args, terms=terms, task=task, train_dataset=data.train, eval_dataset=data.eval
)
trainer.train()
print(trainer.evaluate())
