"""The intact part of a damaged checkpoint as a new file."""
