"""A run's directory: identity, lock, and overrides by the environment."""
