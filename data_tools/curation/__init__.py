"""Cleaning of corpora before they are encoded: recipes of steps that run on datatrove, every drop accounted for."""
