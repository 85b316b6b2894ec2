"""Checkpoints that are directories, and changes to one: to the bytes of a file, or to which files there are."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from tests.helpers.checkpoints import trained
from tests.robustness.hostile.directories import safetensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from tests.robustness.fuzz.mutate import Content, Files

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def folders() -> list[tuple[str, Files]]:
    """A small one of each layout: its files by their names."""
    tree = trained()
    trainer = {
        **_weights(),
        "optimizer.pt": saved(tree["optimizer"]),
        "scheduler.pt": saved(tree["scheduler"]),
        "rng_state.pth": saved(tree["rng"]),
        "trainer_state.json": json.dumps({"global_step": 3, "epoch": 1.5, "log_history": [{"loss": 0.5}]}).encode(),
    }
    accelerate = {
        "pytorch_model.bin": saved(tree["model"]),
        "optimizer.bin": saved(tree["optimizer"]),
        "scheduler.bin": saved(tree["scheduler"]),
        "random_states_0.pkl": saved(tree["rng"]),
    }
    deepspeed = {
        "latest": b"global_step3",
        "global_step3/mp_rank_00_model_states.pt": saved({"module": tree["model"], "optimizer": None}),
        "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt": saved({"optimizer_state_dict": tree["optimizer"]}),
    }
    run = {
        "run.json": b"{}",
        "metrics.jsonl": b'{"step":1,"time":1.0,"metrics":{"loss":0.5}}\n',
        "checkpoints/step-00000001.pt": saved(trained(1)),
        "checkpoints/step-00000003.pt": saved(tree),
    }
    return [
        ("weights", _weights()),
        ("trainer", trainer),
        ("accelerate", accelerate),
        ("deepspeed", deepspeed),
        ("run", run),
        ("distributed", _distributed(tree)),
    ]


def saved(tree: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(tree, stream, **options)
    return stream.getvalue()


def _weights() -> Files:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    places = {f"w{index}": shard for index, shard in enumerate(_SHARDS)}
    shards = {shard: safetensors({name: entry}, b"\0" * 16) for name, shard in places.items()}
    return {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": places}).encode(), **shards}


def _distributed(tree: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save_distributed({"model": tree["model"], "epoch": 4}, checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shuffled(files: Files, others: Sequence[tuple[str, Content]], random: Random) -> Files:
    """Files left out, cut short, exchanged, doubled under another name, or in the place of another."""
    files = dict(files)
    name, other = random.choice(sorted(files)), random.choice(sorted(files))
    kind = random.randrange(5)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = files[name][: random.randrange(len(files[name]) + 1)]
    elif kind == 2:
        files[name], files[other] = files[other], files[name]
    elif kind == 3:
        files[name.replace("1", "2") if "1" in name else f"{name}.bak"] = files[name]
    else:
        stranger = random.choice(others)[1]
        files[name] = stranger if isinstance(stranger, bytes) else random.choice(list(stranger.values()))
    return files or {"notes.txt": b""}
