"""Zip files of other programs: what they are, and which checkpoints are in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trackopt.errors import ForeignFormatError

if TYPE_CHECKING:
    from trackopt.archive.formats.zip_source import ZipSource

_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl", ".tar")
_MAX_NAMES = 3


def check(source: ZipSource) -> None:
    """Refuse a zip that ``torch.save`` did not write.

    Args:
        source: A zip without a pickle of torch's. One with other records of torch's is damaged, and is not refused.

    Raises:
        ForeignFormatError: It is another program's; the message says what it is and what to open in it.
    """
    path, names = source.path, list(source.zipped.records)
    if names and all(name.endswith(".npy") for name in names):
        count = f"{len(names)} array{'s' if len(names) > 1 else ''}"
        what = f"it is a NumPy archive (.npz) of {count}; read it with `numpy.load`"
    elif "model.weights.h5" in names:
        what = "it is a Keras model; trackopt reads PyTorch's formats"
    elif inside := [name for name in names if name.endswith(_CHECKPOINT_SUFFIXES)]:
        kind = "stable-baselines3 model" if "policy.pth" in names and "data" in names else "zip file"
        shown = ", ".join(inside[:_MAX_NAMES]) + (", …" if len(inside) > _MAX_NAMES else "")
        what = f"it is a {kind} that contains checkpoints ({shown}); unpack it and name one of them"
    elif source.find("version") or any("/data/" in name for name in names):
        return
    else:
        what = "a zip file without a data.pkl is not a checkpoint; name one that torch.save wrote"
    raise ForeignFormatError(f"{path}: {what}")
