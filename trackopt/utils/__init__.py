"""What every room may use: files, names, log lines."""
