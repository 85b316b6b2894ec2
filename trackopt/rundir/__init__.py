"""A run's directory: identity, lock, and what the environment overrides."""
