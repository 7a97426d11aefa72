"""DSKD inside other programs, each in its own module, with the extra of its name."""
