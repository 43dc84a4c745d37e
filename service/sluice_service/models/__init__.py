"""Which models are served, and what each of them can be asked."""
