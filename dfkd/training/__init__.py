"""From a pool of labelled synthetic images and a frozen teacher to a student."""
