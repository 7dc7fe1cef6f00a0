"""snatd keeps the source address of container traffic inside a flannel network."""

__version__ = "0.1.0"
