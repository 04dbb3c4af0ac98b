"""Priors: a diffusion pipeline's folder -> its networks, frozen, and what each kind of them takes."""
