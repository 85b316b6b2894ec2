"""What the user holds: `wrap`, `Run` and their options."""
