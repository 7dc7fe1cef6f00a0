"""The network in namespaces that the demo, the tests and the benchmark stand on."""
