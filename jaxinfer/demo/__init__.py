"""The small models that ship with the package, and the scripts that trained and evaluate them."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The folder of the packaged model that answers questions, in Hugging Face format."""

ENCODER_DIR = Path(__file__).parent / "encoder"
"""Of the one that makes vectors of them, as sentence-transformers has folders."""

CLASSIFIER_DIR = Path(__file__).parent / "classifier"
"""Of the one that says of which family they are."""

PACKAGED = (MODEL_DIR, ENCODER_DIR, CLASSIFIER_DIR)
