"""Batch jobs over files of rows: read lazily, run through a model, and written so that a killed job can go on."""
