"""How new weights come from the learner to the engines: one protocol, two transports."""
