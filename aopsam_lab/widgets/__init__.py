"""The explorer: PCM, PEM and prompts of an image in JupyterLab and Voila."""
