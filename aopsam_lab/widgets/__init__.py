"""Explore a picture by hand: the PCM and PEM widget for JupyterLab and Voila."""
