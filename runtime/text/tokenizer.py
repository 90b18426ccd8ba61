"""Text to tokens with a checkpoint's tokenizer.json; text never becomes a special token."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from aloud.errors import TokenizerInvalid
from aloud.models.csm import BEGIN_OF_TEXT, END_OF_TEXT


class Tokenizer:
    """A byte-pair tokenizer and the two tokens that stand around every text of a prompt."""

    def __init__(self, path: Path, text_vocabulary: int) -> None:
        """Read tokenizer.json; `text_vocabulary` is the number of text embeddings that the model has."""
        if not path.is_file():
            raise TokenizerInvalid(
                f"There is no tokenizer.json in {path.parent}. Copy it from the repository that the model came from."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise TokenizerInvalid(f"{path} cannot be read as a tokenizer: {error}. Download it again.") from error
        # Whatever added token a text spells out stays text: all are made special, and special ones are not parsed.
        self._tokenizer.add_special_tokens(list(self._tokenizer.get_added_tokens_decoder().values()))
        self._tokenizer.encode_special_tokens = True
        self.begin = self._named(BEGIN_OF_TEXT, path)
        self.end = self._named(END_OF_TEXT, path)
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= text_vocabulary:
            raise TokenizerInvalid(
                f"{path} has tokens up to {largest}, but the model has embeddings for {text_vocabulary}. "
                "Use the tokenizer.json that belongs to the model."
            )

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` alone, with nothing around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _named(self, content: str, path: Path) -> int:
        token = self._tokenizer.token_to_id(content)
        if token is None:
            raise TokenizerInvalid(
                f"{path} has no token {content}, which a prompt of this model needs. "
                "Use the tokenizer.json that belongs to the model."
            )
        return int(token)
