"""Quality: what students learn from the images of guided diffusion and of its controls, at equal seconds.

cifar10.toml, demo.toml    a scenario: teacher, student, and every method with the settings that were tried
scenario.py                what such a file says          worlds.py, cifar10.py   real images, teacher, the prior's data
sets.py                    images within a budget         students.py             a student of a set, judged
study.py                   tuning and the benchmark       tables.py               what came of it, in words
"""
