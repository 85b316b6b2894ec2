"""Loops as people write them, killed, left and resumed at random: each is exact, or the difference is reported."""
