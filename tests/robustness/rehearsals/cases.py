"""Trainings to rehearse: correct ones, and ones with a planted fault whose cause is known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RESUME = "--resume {checkpoint}"


@dataclass(frozen=True)
class Case:
    """A script with words that change it; the cause of its fault, and what the report says of it.

    Attributes:
        line: The script's name without suffix, and its words.
        kind: The kind of the cause; empty if the training is correct.
        seen: A part of the observation.
    """

    line: str
    kind: str = ""
    seen: str = ""

    def rehearse(self, *options: str) -> dict[str, Any]:
        """Rehearse it in a directory of its own; return the outcome."""
        script, *words = self.line.split()
        resume = ("--resume-with", RESUME) if script == "plain" else ()
        with tempfile.TemporaryDirectory() as directory:
            for file in (f"{script}.py", "points.py"):
                shutil.copy(HERE / file, directory)
            command = [sys.executable, "-m", "trackopt", "rehearse", "--json", *resume, *options]
            done = subprocess.run(
                [*command, "--", sys.executable, f"{script}.py", *words],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": directory},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode == 2:
            return {"exact": False, "trouble": done.stderr}
        return json.loads(done.stdout)

    def is_right(self, outcome: dict[str, Any]) -> bool:
        """Return whether the outcome is the right one."""
        if not self.kind or "trouble" in outcome:
            return bool(outcome["exact"]) and not self.kind
        verdict = outcome["verdict"]
        return bool(verdict) and verdict["cause"]["kind"] == self.kind and self.seen in verdict["cause"]["seen"]


FAULTY = (
    Case("plain no-optimizer", "optimizer", "its state was dropped"),
    Case("plain half", "optimizer", "exp_avg_sq is bfloat16 instead of float32"),
    Case("plain no-scheduler", "lr", "StepLR was at"),
    Case("plain buffers", "weights", "1.running_mean"),
    Case("plain no-average", "object", "AveragedModel `average` is not restored"),
    Case("plain twice", "data", "an epoch is counted twice"),
    Case("plain order", "data", "torch.Generator `order`"),
    Case("plain generators", "rng", "the global generator of torch"),
    Case("plain phase", "accumulation", "in another phase"),
    Case("plain ahead", "data", "had been fetched ahead"),
    Case("plain enumerate", "value", "`index` was"),
    Case("plain running", "value", "`running` was"),
    Case("plain hidden", "value", "`hidden` (tensor"),
    Case("plain augment", "data", "the generators of the loader's workers are not restored"),
    Case("transformers_trainer no-optimizer", "optimizer", "its state was dropped"),
    Case("transformers_trainer no-skip", "data", "the data start again"),
    Case("lightning_trainer shuffle", "rng", "the global generator of torch starts again from its seed"),
    Case("accelerate_loop no-scheduler", "lr", "LambdaLR was at"),
    Case("accelerate_loop twice", "data", "an epoch is counted twice"),
    Case("ignite_engine no-optimizer", "optimizer", "its state was dropped"),
)
CORRECT = tuple(
    map(
        Case,
        (
            "plain",
            "plain momentum",
            "plain rmsprop cosine",
            "plain warmup",
            "plain batchnorm",
            "plain accumulate",
            "plain noise",
            "plain workers",
            "plain validate",
            "plain middle",
            "plain middle batchnorm cosine",
            "plain keep-running",
            "plain keep-hidden",
            "plain seeded-augment",
            "transformers_trainer",
            "transformers_trainer accumulate",
            "transformers_trainer cosine",
            "lightning_trainer",
            "lightning_trainer two",
            "lightning_trainer accumulate",
            "accelerate_loop",
            "accelerate_loop accumulate",
            "ignite_engine",
        ),
    )
)
