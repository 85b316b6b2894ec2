"""One format of checkpoints in each file: ``load(path, file) -> Contents``."""
