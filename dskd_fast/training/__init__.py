"""From good images to a run: the loop, one step, checkpoints, several processes, start and resume."""
