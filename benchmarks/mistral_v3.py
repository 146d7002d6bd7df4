"""Mistral's own v3 tokenizer, which mistral-common ships, in the Hugging Face form that a model folder holds.

save_tokenizer(Path("/tmp/7b"))      -> /tmp/7b/{tokenizer.json,tokenizer_config.json}
"""

import shutil
import tempfile
from pathlib import Path

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def save_tokenizer(folder: Path) -> None:
    """Convert the SentencePiece file, for which the package sentencepiece is needed, and save it into a folder."""
    import mistral_common
    from transformers import LlamaTokenizer

    source = next((Path(mistral_common.__file__).parent / "data").glob("*240323.model.v3"))
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(source, Path(temporary, "tokenizer.model"))
        LlamaTokenizer.from_pretrained(temporary).save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer that was converted elsewhere."""
    for path in (source / name for name in FILES):
        if path.exists():
            shutil.copy(path, folder)
