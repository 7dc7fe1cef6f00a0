"""The packages, really installed on a booted systemd."""
