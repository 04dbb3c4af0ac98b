"""What `engine.store` keeps engines with: the folder and its locks, manifests, payloads, links, the disk's refusals."""
