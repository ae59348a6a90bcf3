"""A grid of runs, made one by one and never twice, and what they show together.

`plan` reads the study's file, `conduct` makes the runs, `record` is what is kept of each, `figures`
compares them, `report` writes it down.
"""
