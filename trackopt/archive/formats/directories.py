"""Checkpoints that are a directory: its layout, and its files as one tree.

Each layout names its files and the keys of their trees. It is an error if a required file is missing or unreadable; an
optional file that cannot be read is reported as a problem.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats import manifest, unpacked
from trackopt.archive.formats.members import MultiFileSource, prefix_storage_keys
from trackopt.archive.io.open_files import OpenFiles, resolve_inside
from trackopt.archive.io.source import Contents
from trackopt.archive.unpickler.limits import MalformedPickle, PickleLimitExceeded, check_limits, make_error
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trackopt.archive.io.file import File
    from trackopt.archive.io.source import TensorSource

    Load = Callable[[Path, File], Contents]
    Patterns = tuple[tuple[re.Pattern[str], str], ...]
    Layout = Callable[[OpenFiles, Load], Contents]

#: In a run's own sharded checkpoint: everything that is not sharded.
UNSHARDED_FILE = "training.pt"
_SHARDED = {".metadata", UNSHARDED_FILE, manifest.NAME}
_STEP = re.compile(r"(?:checkpoint|checkpoint_|checkpoint-|global_step|step_|step-)(\d+)")
_MODEL = re.compile(
    r"(?P<key>model|pytorch_model|adapter_model|diffusion_pytorch_model)(?P<number>_\d+)?"
    r"\.(?:safetensors|bin)(?P<index>\.index\.json)?"
)
#: Files of a layout other than its weights, by pattern, and the format of their keys.
_TRAINER = (
    (re.compile(r"(optimizer|scheduler|scaler)\.(?:pt|bin)"), "{0}"),
    (re.compile(r"(rng_state(?:_\d+)?)\.pth"), "{0}"),
    (re.compile(r"(trainer_state)\.json"), "{0}"),
    (re.compile(r"(training_args)\.bin"), "{0}"),
)
_ACCELERATE = (
    (re.compile(r"(optimizer(?:_\d+)?|scheduler(?:_\d+)?|sampler(?:_\d+)?|dl_state_dict(?:_\d+)?)\.bin"), "{0}"),
    (re.compile(r"(scaler)\.pt"), "{0}"),
    (re.compile(r"(random_states_\d+|custom_checkpoint_\d+)\.pkl"), "{0}"),
)
_DEEPSPEED = (
    (re.compile(r"(mp_rank_\d+)_model_states\.pt"), "{0}"),
    (re.compile(r"(?:bf16_|fp16_)?zero_pp_(rank_\d+_mp_rank_\d+)_optim_states\.pt"), "optimizer_{0}"),
)


def find_newest(directory: Path) -> Path | None:
    """Return the directory if it is a checkpoint, else the newest checkpoint directory in it, else None."""
    if _layout(directory) is not None:
        return directory
    latest = directory / "latest"
    if latest.is_file() and latest.stat().st_size < 256:
        tagged = resolve_inside(directory, latest.read_text(encoding="utf-8", errors="replace").strip())
        if tagged.is_dir() and _layout(tagged) is not None:
            return tagged
    numbered = {int(match[1]): path for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))}
    by_step = [path for _, path in sorted(numbered.items()) if path.is_dir() and _layout(path) is not None]
    return by_step[-1] if by_step else None


def is_sharded(directory: Path) -> bool:
    """Return whether `torch.distributed.checkpoint` wrote the files, perhaps not all of them.

    Other programs write a ``manifest.json`` or a ``training.pt``, too, so one such name is not enough.
    """
    names = {path.name for path in directory.iterdir()}
    marks = len(names & _SHARDED)
    return marks > 1 or (marks == 1 and any(name.endswith(".distcp") for name in names))


def load(directory: Path, load_file: Load) -> Contents:
    """Read the structure of a checkpoint that is a directory.

    Args:
        directory: What `find_newest` returned.
        load_file: Reads the structure of an open file.

    Raises:
        ArchiveError: A required file is missing, damaged or outside of the directory.
    """
    layout = _layout(directory)
    if layout is None:
        raise ArchiveError(f"{directory}: there is no checkpoint in this directory; name a run's directory or a file")
    return _close_on_error(OpenFiles(directory), lambda files: layout(files, load_file))


def load_index(path: Path, load_file: Load) -> Contents:
    """Read the weights in the files that an index names."""

    def read(files: OpenFiles) -> Contents:
        merged = _DirectoryTree(files, load_file)
        return merged.contents("sharded weights", merged.read_shards(path.name))

    return _close_on_error(OpenFiles(path.parent), read)


def _close_on_error(files: OpenFiles, read: Callable[[OpenFiles], Contents]) -> Contents:
    try:
        return read(files)
    except BaseException:
        files.close()
        raise


@dataclass
class _DirectoryTree:
    """The files of a directory that have been read so far, as one tree."""

    files: OpenFiles
    load_file: Load
    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, TensorSource] = field(default_factory=dict)
    globals: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    trees: dict[tuple[int, int], Any] = field(default_factory=dict)

    def read_member(self, name: str) -> Any:
        """Return the tree of one file; it is read once however many names it has."""
        path, file = self.files.open(name)
        if name.endswith(".json"):
            return _parse_json(path, self.files.read_all(name))
        stat = os.fstat(file.descriptor)
        key = stat.st_dev, stat.st_ino
        if key not in self.trees:
            self.trees[key] = self._read(name, path, file)
        return self.trees[key]

    def _read(self, name: str, path: Path, file: File) -> Any:
        contents = self.load_file(path, file)
        self.sources[name] = contents.source
        self.globals.update(dict.fromkeys(contents.globals))
        self.problems.extend(f"{name}: {line}" for line in contents.problems)
        return prefix_storage_keys(contents.tree, name, contents.source)

    def read_shards(self, index: str) -> dict[str, Any]:
        """Return the tensors that an index names, each from the file that it gives."""
        content = self.read_member(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise ArchiveError(f"{self.files.directory / index}: it has no map from weights to files; copy it again")
        trees = {name: self.read_member(name) for name in dict.fromkeys(weight_map.values())}
        missing = [
            key for key, name in weight_map.items() if not isinstance(trees[name], dict) or key not in trees[name]
        ]
        if missing:
            first = f"{missing[0]!r} is not in {weight_map[missing[0]]!r}"
            self.problems.append(f"{index}: {first} ({len(missing)} such weights)")
        skipped = set(missing)
        weights = {key: trees[name][key] for key, name in weight_map.items() if key not in skipped}
        unlisted = sum(len(tree.keys() - weights.keys()) for tree in trees.values() if isinstance(tree, dict))
        if unlisted:
            self.problems.append(f"{index}: {unlisted} weights in its files are not in it")
        return weights

    def read_models(self) -> None:
        """Read the models, each from an index if there is one, else from a single file."""
        matches = sorted(
            (match["index"] is None, name, match)
            for name in _names(self.files.directory)
            if (match := _MODEL.fullmatch(name))
        )
        for is_single, name, match in matches:
            key = "model" + (match["number"] or "")
            if key not in self.tree:
                self.tree[key] = self.read_member(name) if is_single else self.read_shards(name)

    def read_extra_files(self, patterns: Patterns) -> None:
        """Read the files other than the weights; report those that cannot be read."""
        for name in _names(self.files.directory):
            for pattern, key in patterns:
                if match := pattern.fullmatch(name):
                    try:
                        self.tree[key.format(*match.groups())] = self.read_member(name)
                    except ArchiveError as error:
                        self.problems.append(f"{name}: {str(error).removeprefix(f'{self.files.directory / name}: ')}")

    def contents(self, form: str, tree: Any = None) -> Contents:
        source = MultiFileSource(self.files.directory, self.sources)
        tree = self.tree if tree is None else tree
        return Contents(form, tree, source, tuple(self.globals), self.problems, self.files)


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return check_limits(json.loads(data))
    except PickleLimitExceeded as error:
        raise make_error(path, error, "its JSON") from error
    except (ValueError, RecursionError, MalformedPickle) as error:
        raise ArchiveError(f"{path}: it is no valid JSON ({error}); copy it again") from error


def _names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted by the numbers in them."""
    names = [path.name for path in directory.iterdir()]
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else 0 for part in re.split(r"(\d+)", name)])


def _layout(directory: Path) -> Layout | None:
    """Return the function that reads a directory; None if it has no known layout."""
    try:
        names, sharded = _names(directory), is_sharded(directory)
    except OSError as error:
        raise ArchiveError(f"{directory}: cannot be looked at ({error.strerror}); check its permissions") from error
    if sharded and (UNSHARDED_FILE in names or manifest.NAME in names):
        return _sharded
    if sharded:
        from trackopt.archive.formats import dcp

        return lambda files, _: dcp.load(files)
    if unpacked.PICKLE in names and unpacked.is_unpacked(directory):
        return lambda files, _: unpacked.load(files)
    if any(pattern.fullmatch(name) for name in names for pattern, _ in _DEEPSPEED):
        return _deepspeed
    if "trainer_state.json" in names:
        return _framework_layout("Hugging Face Trainer", _TRAINER)
    if any(name.startswith("random_states_") or name == "optimizer.bin" for name in names):
        return _framework_layout("Accelerate", _ACCELERATE)
    if any(_MODEL.fullmatch(name) for name in names):
        return _framework_layout("Hugging Face model", ())
    return None


def _sharded(files: OpenFiles, load_file: Load) -> Contents:
    """Read a run's own: the sharded objects from DCP, under the names of their parameters; the rest from one file."""
    from trackopt.archive.formats import dcp

    sharded = dcp.load(files)
    merged = _DirectoryTree(files, load_file)
    merged.sources["DCP"] = sharded.source
    merged.problems.extend(sharded.problems)
    merged.globals.update(dict.fromkeys(sharded.globals))
    unsharded = merged.read_member(UNSHARDED_FILE)
    if not isinstance(unsharded, dict):
        raise ArchiveError(f"{files.directory / UNSHARDED_FILE}: it holds no dictionary; use another checkpoint")
    tree = {**sharded.tree, **unsharded} if isinstance(sharded.tree, dict) else unsharded
    optimizer = tree.get("optimizer")
    for node in (optimizer, *(optimizer.values() if isinstance(optimizer, dict) else ())):
        if isinstance(node, dict) and "param_groups" in node:
            node.setdefault("state", {})  # DCP leaves out what is empty
    return replace(merged.contents("DCP", tree), source=_ManifestSource(files, merged.sources))


class _ManifestSource(MultiFileSource):
    """Sources of files whose checksums are in the manifest."""

    def __init__(self, files: OpenFiles, members: dict[str, TensorSource]) -> None:
        super().__init__(files.directory, members)
        self._files = files
        self.checksummed_bytes = files.bytes

    def verify_checksums(self) -> Iterator[str]:
        """Yield one line for each file that differs from what was written."""
        try:
            yield from manifest.find_damaged(self._files)
        except ArchiveError as error:
            yield str(error).removeprefix(f"{self.path}: ")


def _framework_layout(form: str, patterns: Patterns) -> Layout:
    def read(files: OpenFiles, load_file: Load) -> Contents:
        merged = _DirectoryTree(files, load_file)
        merged.read_models()
        merged.read_extra_files(patterns)
        return merged.contents(form, None if patterns else merged.tree.get("model"))

    return read


def _deepspeed(files: OpenFiles, load_file: Load) -> Contents:
    """Read model states of rank 0 to the top level; optimizer states are shards of flat tensors, by rank."""
    merged = _DirectoryTree(files, load_file)
    merged.read_extra_files(_DEEPSPEED)
    first = next((key for key in merged.tree if key.startswith("mp_rank_")), None)
    states = merged.tree.pop(first) if first is not None else {}
    if isinstance(states, dict):
        known = {"module": "model", "lr_scheduler": "lr_scheduler", "optimizer": "optimizer"}
        top = {key: states[name] for name, key in known.items() if states.get(name)}
        merged.tree = {**top, **merged.tree, "client": {key: states[key] for key in states if key not in known}}
    for key, node in merged.tree.items():
        if key.startswith("optimizer_rank_") and isinstance(node, dict):
            merged.tree[key] = node.get("optimizer_state_dict", node)
    if not merged.tree:
        raise ArchiveError(f"{files.directory}: none of its files can be read ({merged.problems[0]})")
    return merged.contents("DeepSpeed")
