"""Compiled networks: tensors and graphs only; no teacher, no data set, no loss lives here."""
