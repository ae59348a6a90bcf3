"""What runs beside an engine: worker, episodes, journal, and the engine itself."""
