"""The chat format as token ids: the template, and what a tool call must be."""
