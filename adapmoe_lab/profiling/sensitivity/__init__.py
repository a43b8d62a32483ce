"""What skipping experts costs, layer by layer."""
