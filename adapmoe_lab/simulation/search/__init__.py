"""Which cache and which prefetch serve a trace best."""
