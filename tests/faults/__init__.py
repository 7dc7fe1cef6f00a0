"""Faults to survive: a test for each row of README.md, with the row's number in its name."""
