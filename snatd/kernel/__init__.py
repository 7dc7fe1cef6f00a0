"""The kernel's side: rulesets, links and events. Imports `core`, never `host`."""
