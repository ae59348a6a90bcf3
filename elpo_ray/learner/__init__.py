"""The learner: a Hugging Face causal LM under DeepSpeed, one `LearnerRank` a process."""
