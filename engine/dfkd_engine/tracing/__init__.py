"""What `engine.graph` traces with: calls that are intercepted, names of operations, the modules they came from."""
