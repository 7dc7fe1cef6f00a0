"""Pure values and decisions. Nothing here reads, writes, waits, logs or knows what time it is."""
