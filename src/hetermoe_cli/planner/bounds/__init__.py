"""Lower bounds: in closed form, by perfectly divisible work, and by mixtures of patterns with chains as rows."""
