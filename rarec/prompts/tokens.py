"""A Hugging Face tokenizer for prompts that are built from pieces of text, with the special tokens around them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
_SPACES = ("▁", "Ġ")
_ANCHOR = "\n"
"""Text that merges with nothing. A tokenizer that adds a space at the start of a text adds none after it."""


class TextTokenizer:
    """Tokenise pieces of text that will be joined.

    Args:
        tokenizer: of the language model.
        opens: start every text with a special token, even if the tokenizer adds none. Decoders need it: their attention
            concentrates on the first position (attention sink), which a slot must not replace.

    Attributes:
        prefix: special tokens before a text, such as [CLS].
        suffix: special tokens after a text, such as [SEP].
        filler: a token id for positions that are never read.
        adds_space: whether the tokenizer adds a space before a text, as SentencePiece mostly does.
        fingerprint: sha256 of the tokenizer's vocabulary and rules, prefix and suffix.
    """

    def __init__(self, tokenizer: Any, opens: bool = False) -> None:
        self._tokenizer = tokenizer
        bare, whole = self._ids("a"), self._ids("a", add_special_tokens=True)
        start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        opening = [next(token for token in ends if token is not None)] if opens and not start else whole[:start]
        self.prefix: Int32 = np.array(opening, np.int32)
        self.suffix: Int32 = np.array(whole[start + len(bare) :], np.int32)
        self.filler: int = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.adds_space = bool(bare) and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(_SPACES)
        self._anchor = self._ids(_ANCHOR)
        around = f"{self.prefix.tolist()} {self.suffix.tolist()}"
        self.fingerprint = hashlib.sha256(f"{self._spelling()} {around}".encode()).hexdigest()

    def __call__(self, text: str, spaced: bool = False, most: int | None = None, plain: bool = True) -> Int32:
        """Return the token ids of a piece of text.

        Args:
            text: may be empty.
            spaced: put a space before it.
            most: cut after this many tokens.
            plain: read special tokens such as `[SEP]` as plain text; set for titles, but not for templates.
        """
        return np.array(self._piece(text, spaced, plain)[:most] if text else [], np.int32)

    def __len__(self) -> int:
        """Return the size of the vocabulary. A model's embedding table may have more rows, which are unused."""
        return len(self._tokenizer)

    def save(self, path: Path) -> None:
        """Write it in the format of the package `tokenizers`, if it has one."""
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        if core is not None:
            core.save(str(path))

    def word(self, token: int) -> str:
        """Return a token id as text; as the raw token if the text is white space or an incomplete character."""
        text = str(self._tokenizer.decode([token])).strip()
        return (
            text
            if text and "\N{REPLACEMENT CHARACTER}" not in text
            else str(self._tokenizer.convert_ids_to_tokens(token))
        )

    def _piece(self, text: str, spaced: bool, plain: bool) -> list[int]:
        asked = {"split_special_tokens": plain}
        if not self.adds_space:
            return self._ids(" " + text if spaced else text, **asked)
        if spaced:
            return self._ids(text, **asked)
        behind = self._ids(_ANCHOR + text, **asked)
        length = len(self._anchor)
        return behind[length:] if length and behind[:length] == self._anchor else self._ids(text, **asked)

    def _ids(self, text: str, **asked: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, **{"add_special_tokens": False, "verbose": False, **asked})["input_ids"]
        return ids

    def _spelling(self) -> str:
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        return str(core.to_str()) if core is not None else repr(sorted(self._tokenizer.get_vocab().items()))
