"""From a teacher and a prior to labelled images: schedule, prompts, noise, CutMix, guidance, the sampling loop."""
