"""Tests of curation: recipes, steps, stages, the report, and where they run."""
