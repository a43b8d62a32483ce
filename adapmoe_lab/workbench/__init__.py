"""What joins everything: the interactive panel, and the JupyterLab it opens in."""
