"""Measures the running daemon in namespaces of its own: `make bench`. Figures are in README.md."""
