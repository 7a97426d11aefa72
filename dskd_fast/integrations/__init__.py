"""A trained detector inside other programs, each with the extra of its name."""
