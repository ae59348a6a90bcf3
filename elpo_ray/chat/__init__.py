"""The chat format as token ids: the template, and the check of a tool call."""
