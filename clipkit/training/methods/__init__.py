"""How each training method learns; clipkit.training.registry lists them."""
