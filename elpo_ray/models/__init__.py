"""Where a model comes from: a folder that is checked, a tiny one that is built."""
