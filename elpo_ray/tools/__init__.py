"""Tools of the agent: the code interpreter and the hosts that run it."""
