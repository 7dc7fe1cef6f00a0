"""snatd beside the real Docker: real daemons on real namespaces, and who called as the oracle."""
