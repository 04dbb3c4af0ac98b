"""Images on disk and in batches: shards, class folders, and the loaders of training."""
