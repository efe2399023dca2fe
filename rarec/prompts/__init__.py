"""Hybrid prompt templates: hard text and named soft slots to token ids and slot positions. Knows no torch."""

from rarec.prompts.hybrid import Encoded, LaidOut, lay_out
from rarec.prompts.pair import PromptPair
from rarec.prompts.tokens import TextTokenizer

__all__ = ["Encoded", "LaidOut", "PromptPair", "TextTokenizer", "lay_out"]
