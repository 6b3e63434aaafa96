"""The small model that ships with the package, and the scripts that trained and evaluate it."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The folder of the packaged model, in Hugging Face format."""
