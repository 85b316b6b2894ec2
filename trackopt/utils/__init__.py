"""Helpers for every room: files, names, log lines."""
