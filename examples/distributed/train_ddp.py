"""Train with DistributedDataParallel, tracked and resumable; every rank runs this script.

torchrun --nproc-per-node=2 train_ddp.py    # on GPUs if there are some; kill it and run it again: it resumes
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import trackopt


def circle():
    """2,000 points in a square, labelled by whether they lie in a circle; the same on every rank."""
    points = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TensorDataset(points, (points.norm(dim=1) < 0.8).long())


def main():
    dist.init_process_group()  # before wrap()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())  # dropout differs between ranks; DDP broadcasts the weights of rank 0
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 2)).to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=160)
    data = circle()
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))

    run = trackopt.wrap(optimizer, scheduler, model=model, dir="runs/ddp", save_every=20)
    for epoch in run.epochs(5):
        loader.sampler.set_epoch(epoch)
        for points, labels in run.batches(loader):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(points.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.log(loss=loss)  # the value of rank 0
            run.log(mean_loss=loss, reduce="mean")  # the mean over all ranks
    run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
