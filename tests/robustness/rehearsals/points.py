"""The data of these trainings."""

import torch
from torch.utils.data import Dataset


class Points(Dataset):
    """96 points of two classes."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        point = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return point, (point.sum() > 0).long()
