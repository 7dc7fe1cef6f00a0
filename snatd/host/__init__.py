"""The node's side: files, the journal and systemd. Imports `core`, never `kernel`."""
