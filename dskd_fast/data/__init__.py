"""Images on disk, the categories they form, and the tensors made of them."""
