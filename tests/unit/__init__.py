"""Decisions, parsers and files: no processes (the linters' test apart), no sockets, no sleep."""
