"""The networks of a synthesis as compiled engines: which a run needs, building them, choosing among backends."""
