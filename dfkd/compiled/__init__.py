"""Functions of tensors as compiled engines: their key, building them, choosing among backends."""
