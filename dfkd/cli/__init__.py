"""The commands: thin shells that turn flags into typed options and call the method."""
