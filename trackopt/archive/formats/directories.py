"""Checkpoints that are a directory: which layout it has, and the union of its files as one tree.

Each layout names its files and the keys under which their trees stand. A file that a layout cannot do without
and that is missing or unreadable is an error; any other one that cannot be read is a problem that is told.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trackopt.archive.formats import manifest
from trackopt.archive.formats.members import MultiFileSource, OpenFiles, prefix_storage_keys, resolve_inside
from trackopt.archive.io.source import Contents
from trackopt.archive.unpickler.limits import MalformedPickle, check_limits
from trackopt.errors import ArchiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trackopt.archive.formats.members import Load
    from trackopt.archive.io.source import TensorSource

#: In a run's own sharded checkpoint: everything that is not spread over processes.
UNSHARDED_FILE = "training.pt"
_SHARDED = {".metadata", UNSHARDED_FILE, manifest.NAME}
_STEP = re.compile(r"(?:checkpoint|checkpoint_|checkpoint-|global_step|step_|step-)(\d+)")
_MODEL = re.compile(
    r"(?P<key>model|pytorch_model|adapter_model|diffusion_pytorch_model)(?P<number>_\d+)?"
    r"\.(?:safetensors|bin)(?P<index>\.index\.json)?"
)
#: Files of a layout beside its weights, by pattern, and what their key is made of.
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


def newest(directory: Path) -> Path | None:
    """The directory itself if it is a checkpoint, else its newest checkpoint that is a directory, else None."""
    if _layout(directory) is not None:
        return directory
    latest = directory / "latest"
    if latest.is_file() and latest.stat().st_size < 256:
        tagged = resolve_inside(directory, latest.read_text(errors="replace").strip())
        if tagged.is_dir() and _layout(tagged) is not None:
            return tagged
    numbered = {int(match[1]): path for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))}
    found = [path for _, path in sorted(numbered.items()) if path.is_dir() and _layout(path) is not None]
    return found[-1] if found else None


def is_sharded(directory: Path) -> bool:
    """Whether `torch.distributed.checkpoint` wrote what is there, perhaps not all of it.

    Others have a ``manifest.json`` or a ``training.pt`` too, so one such name alone tells nothing.
    """
    names = {path.name for path in directory.iterdir()}
    marks = len(names & _SHARDED)
    return marks > 1 or (marks == 1 and any(name.endswith(".distcp") for name in names))


def load(directory: Path, one: Load) -> Contents:
    """Read the structure of a checkpoint that is a directory.

    Args:
        directory: What `newest` found.
        load_file: Reads the structure of an open file.

    Raises:
        ArchiveError: A file that must be there is missing, damaged or outside of the directory.
    """
    layout = _layout(directory)
    if layout is None:
        raise ArchiveError(f"{directory}: there is no checkpoint in this directory; name a run's directory or a file")
    return _close_on_error(OpenFiles(directory), lambda files: layout(files, one))


def load_index(path: Path, one: Load) -> Contents:
    """Read the weights that an index spreads over several files beside it."""

    def read(files: OpenFiles) -> Contents:
        union = _DirectoryTree(files, one)
        return union.contents("sharded weights", union.shards(path.name))

    return _close_on_error(OpenFiles(path.parent), read)


def _close_on_error(files: OpenFiles, read: Callable[[OpenFiles], Contents]) -> Contents:
    try:
        return read(files)
    except BaseException:
        files.close()
        raise


@dataclass
class _DirectoryTree:
    """Files that have been read so far."""

    files: OpenFiles
    load_file: Load
    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, TensorSource] = field(default_factory=dict)
    globals: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    trees: dict[tuple[int, int], Any] = field(default_factory=dict)

    def member(self, name: str) -> Any:
        """The tree of one file, which is read once however many names it has."""
        path, file = self.files.open(name)
        if name.endswith(".json"):
            return parsed(path, self.files.text(name))
        key = os.fstat(file).st_dev, os.fstat(file).st_ino
        if key not in self.trees:
            self.trees[key] = self._read(name, path, file)
        return self.trees[key]

    def _read(self, name: str, path: Path, file: int) -> Any:
        contents = self.load_file(path, file)
        self.sources[name] = contents.source
        self.globals.update(dict.fromkeys(contents.globals))
        self.problems.extend(f"{name}: {line}" for line in contents.problems)
        return prefix_storage_keys(contents.tree, name, contents.source)

    def shards(self, index: str) -> dict[str, Any]:
        """The tensors that an index names, each from the file that it says."""
        content = self.member(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ArchiveError(f"{self.files.directory / index}: it has no map from weights to files; copy it again")
        trees = {name: self.member(name) for name in dict.fromkeys(places.values())}
        lost = [key for key, name in places.items() if not isinstance(trees[name], dict) or key not in trees[name]]
        if lost:
            self.problems.append(f"{index}: {lost[0]!r} is not in {places[lost[0]]!r} ({len(lost)} such weights)")
        found = {key: trees[name][key] for key, name in places.items() if key not in set(lost)}
        strays = sum(len(tree.keys() - found.keys()) for tree in trees.values() if isinstance(tree, dict))
        if strays:
            self.problems.append(f"{index}: {strays} weights in its files are not in it")
        return found

    def weights(self) -> None:
        """The models: from an index where there is one, else from a single file."""
        matches = sorted(
            (match["index"] is None, name, match)
            for name in _names(self.files.directory)
            if (match := _MODEL.fullmatch(name))
        )
        for single, name, match in matches:
            key = "model" + (match["number"] or "")
            if key not in self.tree:
                self.tree[key] = self.member(name) if single else self.shards(name)

    def extra_files(self, patterns: Any) -> None:
        """The files beside the weights; one that cannot be read is told."""
        for name in _names(self.files.directory):
            for pattern, key in patterns:
                if match := pattern.fullmatch(name):
                    try:
                        self.tree[key.format(*match.groups())] = self.member(name)
                    except ArchiveError as error:
                        self.problems.append(f"{name}: {str(error).removeprefix(f'{self.files.directory / name}: ')}")

    def contents(self, form: str, tree: Any = None) -> Contents:
        source = MultiFileSource(self.files.directory, self.sources)
        whole = self.tree if tree is None else tree
        return Contents(form, whole, source, tuple(self.globals), self.problems, self.files)


def parsed(path: Path, data: bytes) -> Any:
    """A JSON file's content."""
    try:
        return check_limits(json.loads(data))
    except (ValueError, RecursionError, MalformedPickle) as error:
        raise ArchiveError(f"{path}: it is no sound JSON ({error}); copy it again") from error


def _names(directory: Path) -> list[str]:
    """The files of a directory, numbers in them in order."""
    names = [path.name for path in directory.iterdir()]
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else 0 for part in re.split(r"(\d+)", name)])


def _layout(directory: Path) -> Callable[[OpenFiles, Load], Contents] | None:
    """How to read a directory; None if it is no checkpoint of a known layout."""
    try:
        names, sharded = _names(directory), is_sharded(directory)
    except OSError as error:
        raise ArchiveError(f"{directory}: cannot be looked at ({error.strerror}); check its permissions") from error
    if sharded and (UNSHARDED_FILE in names or manifest.NAME in names):
        return _sharded
    if sharded:
        from trackopt.archive.formats import dcp

        return dcp.load
    if any(pattern.fullmatch(name) for name in names for pattern, _ in _DEEPSPEED):
        return _deepspeed
    if "trainer_state.json" in names:
        return _plain("Hugging Face Trainer", _TRAINER)
    if any(name.startswith("random_states_") or name == "optimizer.bin" for name in names):
        return _plain("Accelerate", _ACCELERATE)
    if any(_MODEL.fullmatch(name) for name in names):
        return _plain("Hugging Face model", ())
    return None


def _sharded(files: OpenFiles, one: Load) -> Contents:
    """A run's own: models and optimizers as DCP has them, under the names of their parameters; the rest in a file."""
    from trackopt.archive.formats import dcp

    spread = dcp.load(files, one)
    union = _DirectoryTree(files, one)
    union.sources["DCP"] = spread.source
    union.problems.extend(spread.problems)
    union.globals.update(dict.fromkeys(spread.globals))
    rest = union.member(UNSHARDED_FILE)
    if not isinstance(rest, dict):
        raise ArchiveError(f"{files.directory / UNSHARDED_FILE}: it holds no dictionary; use another checkpoint")
    tree = {**spread.tree, **rest} if isinstance(spread.tree, dict) else rest
    optimizer = tree.get("optimizer")
    for node in (optimizer, *(optimizer.values() if isinstance(optimizer, dict) else ())):
        if isinstance(node, dict) and "param_groups" in node:
            node.setdefault("state", {})  # DCP leaves out what is empty
    return replace(union.contents("DCP", tree), source=_ManifestSource(files, union.sources))


class _ManifestSource(MultiFileSource):
    """The checksums of whole files, which a list among them gives."""

    def __init__(self, files: OpenFiles, members: dict[str, TensorSource]) -> None:
        super().__init__(files.directory, members)
        self._files = files
        self.checksummed_bytes = files.bytes

    def verify_checksums(self) -> Iterator[str]:
        """One line for each file that is not what was written."""
        try:
            yield from manifest.find_damaged(self._files)
        except ArchiveError as error:
            yield str(error).removeprefix(f"{self.path}: ")


def _plain(form: str, patterns: Any) -> Callable[[OpenFiles, Load], Contents]:
    def read(files: OpenFiles, one: Load) -> Contents:
        union = _DirectoryTree(files, one)
        union.weights()
        union.extra_files(patterns)
        return union.contents(form, None if patterns else union.tree.get("model"))

    return read


def _deepspeed(files: OpenFiles, one: Load) -> Contents:
    """The model states of rank 0 stand at the top; optimizer states are shards of flat tensors, by rank."""
    union = _DirectoryTree(files, one)
    union.extra_files(_DEEPSPEED)
    first = next((key for key in union.tree if key.startswith("mp_rank_")), None)
    states = union.tree.pop(first) if first is not None else {}
    if isinstance(states, dict):
        known = {"module": "model", "lr_scheduler": "lr_scheduler", "optimizer": "optimizer"}
        top = {key: states[name] for name, key in known.items() if states.get(name)}
        union.tree = {**top, **union.tree, "client": {key: states[key] for key in states if key not in known}}
    for key, node in union.tree.items():
        if key.startswith("optimizer_rank_") and isinstance(node, dict):
            union.tree[key] = node.get("optimizer_state_dict", node)
    if not union.tree:
        raise ArchiveError(f"{files.directory}: none of its files can be read ({union.problems[0]})")
    return union.contents("DeepSpeed")
