"""Cleaning of corpora before they are encoded: a recipe of steps that run on datatrove, with every drop accounted for."""
