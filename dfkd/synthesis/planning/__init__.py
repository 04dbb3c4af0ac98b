"""What a synthesis will take before it starts: rows of every network call, memory, seconds."""
