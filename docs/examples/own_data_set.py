"""A data set of your own: anything whose samples are dictionaries of `pixel_values` and `labels`."""

import torch
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model

from cankd_hf import CanKDConfig, CanKDTrainer, FPNConfig, FPNForSemanticSegmentation

STEPS = 40


class Stripes(Dataset):
    """Images [3, 64, 64], normalised for the student, and masks [64, 64] of class numbers (255: no label)."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        mask = (torch.arange(64) // (4 + index % 8) % 2).expand(64, 64)
        return {"pixel_values": mask + torch.randn(3, 64, 64), "labels": mask}


backbone = {"model_type": "resnet", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
student = FPNForSemanticSegmentation(
    FPNConfig(backbone_config=backbone, fpn_channels=32, head_channels=32, num_labels=2)
)
teacher = Dinov2Model(
    Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
)  # "facebook/dinov2-base"
args = CanKDConfig(
    "runs/own_data_set", max_steps=STEPS, per_device_train_batch_size=8, report_to="none", eval_strategy="no"
)
trainer = CanKDTrainer(student, teacher, args, train_dataset=Stripes(), eval_dataset=Stripes())
trainer.train()
print(trainer.evaluate())
trainer.save_model("runs/own_data_set/student")  # loads with from_pretrained
