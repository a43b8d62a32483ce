"""Where all experts lie: in host memory or in files."""
