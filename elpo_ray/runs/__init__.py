"""What a run leaves: its folder, its numbers, its trackers, its summary."""
