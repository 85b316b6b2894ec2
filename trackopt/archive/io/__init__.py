"""Bytes of files: ranges, zip records, checksums, sparse copies."""
