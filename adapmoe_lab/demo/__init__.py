"""How the embedded demo model is made: its text, its training, its measurements and its texts."""
