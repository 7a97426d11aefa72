"""What a user does: train, evaluate, predict, and the demo that does all three."""
