"""The user's side of a training: `wrap`, `Run` and their options."""
