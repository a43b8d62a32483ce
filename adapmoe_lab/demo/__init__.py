"""How the embedded demo model is made: its text, training, measurements, and the evaluation text that ships with it."""
