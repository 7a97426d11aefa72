"""Images as they come: a folder that is watched, and a service."""
