"""Voxtral Mini 3B, audio encoder and text decoder, from random weights to a measured .pte; see ``__main__``."""
