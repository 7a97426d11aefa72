"""The operators: registered with torch, differentiable in the student, dispatched to a backend."""
