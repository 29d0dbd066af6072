"""What each of two gloo processes does in test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cankd_hf.losses import CanKDLoss
from cankd_hf.losses.kernels import blocks
from tests.processes import leave_together


class Adapted(nn.Module):
    """A student of one convolution with its Can block."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Conv2d(3, 6, 1)
        self.loss = CanKDLoss(6)

    def forward(self, image: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self.student(image), teacher)


def model(synchronise: bool) -> nn.Module:
    torch.manual_seed(0)
    adapted = Adapted().double()
    nn.init.normal_(adapted.loss.output_norm.weight)  # type: ignore[union-attr, arg-type]
    return nn.SyncBatchNorm.convert_sync_batchnorm(adapted) if synchronise else adapted


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 6, 8).double(), torch.randn(4, 6, 6, 8).double()


def train(module: nn.Module, image: Tensor, teacher: Tensor, average: bool = False) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        module(image, teacher).backward()
        for parameter in module.parameters() if average else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()


def run(rank: int, rendezvous: str, folder: str) -> None:
    """Train with and without synchronised statistics, and save both states."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    image, teacher = batch()
    mine = image[rank::2], teacher[rank::2]
    plain = model(synchronise=False)
    # each process has statistics of its own
    train(DistributedDataParallel(plain, broadcast_buffers=False), *mine)
    torch.save(plain.state_dict(), f"{folder}/plain{rank}.pt")
    # DDP refuses a SyncBatchNorm on the CPU, whose own forward has no CPU form: gradients are averaged by hand
    synchronised = model(synchronise=True)
    train(synchronised, *mine, average=True)
    torch.save(synchronised.state_dict(), f"{folder}/sync{rank}.pt")
    # unequal batches: one process has three images, the other one
    module = model(synchronise=True)
    part = slice(0, 3) if rank == 0 else slice(3, 4)
    module(image[part], teacher[part])
    torch.save(module.state_dict(), f"{folder}/unequal{rank}.pt")
    # the form for GPUs
    blocks.BLOCKWISE = frozenset()
    synchronised = model(synchronise=True)
    train(synchronised, *mine, average=True)
    torch.save(synchronised.state_dict(), f"{folder}/whole{rank}.pt")
    leave_together(Path(folder), rank)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2], sys.argv[3])
