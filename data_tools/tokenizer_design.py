"""How a trained tokenizer cuts text before its model sees it: digits, runs of spaces, special tokens.

The same for both kinds of model; training is tokenizer_training.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.choices import Digits, TokenizerType, Whitespace
from data_tools.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
EOS_TOKENS = {TokenizerType.BPE: "<|endoftext|>", TokenizerType.SENTENCEPIECE: "</s>"}
DIGITS_OF_THREE = r"\p{N}{1,3}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONGEST_RUN = 24  # spaces that become one token
_FEWEST_LEARNT = {TokenizerType.BPE: 1, TokenizerType.SENTENCEPIECE: BYTES}


@dataclass(frozen=True, kw_only=True)
class TokenizerDesign:
    """What is asked of a tokenizer that is to be trained."""

    kind: TokenizerType = TokenizerType.BPE
    vocabulary_size: int = 32000  # tokens at most, all special ones included
    digits: Digits = Digits.AS_IS
    whitespace: Whitespace = Whitespace.AS_IS
    special_tokens: tuple[str, ...] = ()  # beside the one that ends documents

    def check(self) -> None:
        """Refuse what no tokenizer can be.

        Raises:
            UsageError: the vocabulary cannot hold all bytes, or a special token is empty or given twice.
        """
        all_special = self.all_special_tokens()
        if len(set(all_special)) < len(all_special) or not all(all_special):
            raise UsageError(
                f"--special-token {' '.join(map(repr, self.special_tokens))}",
                f"tokens of at least one character, each once, none of them {EOS_TOKENS[self.kind]}",
                "leave out the one that is there already",
            )
        smallest = BYTES + _FEWEST_LEARNT[self.kind] + len(self.special_tokens) + len(self.space_runs())
        if self.vocabulary_size < smallest:
            raise UsageError(
                f"--vocab-size {self.vocabulary_size} for --type {self.kind.value}",
                f"at least {smallest}: every byte needs a token",
                "ask for a larger vocabulary",
            )

    def all_special_tokens(self) -> list[str]:
        """Return the end-of-document token and those asked for."""
        return [EOS_TOKENS[self.kind], *self.special_tokens]

    def space_runs(self) -> list[str]:
        """Return the runs of spaces that are tokens by decision, not by learning."""
        return [" " * length for length in range(2, _LONGEST_RUN + 1)] if self.whitespace is Whitespace.RUNS else []

    def word_pattern(self) -> str | None:
        """Return what a byte-level BPE cuts text by, None for GPT-2's way, which the libraries have built in.

        These are the published patterns of Qwen 2 and Llama 3: fast libraries know no others.
        """
        digits = {Digits.INDIVIDUAL: r"\p{N}", Digits.GROUPS_OF_3: DIGITS_OF_THREE}.get(self.digits)
        return None if digits is None else _WORDS.replace("DIGITS", digits)

    def digit_steps(self) -> list[Any]:
        """Return the pre-tokenizers that cut numbers for a unigram model."""
        from tokenizers import Regex, pre_tokenizers

        if self.digits is Digits.INDIVIDUAL:
            return [pre_tokenizers.Digits(individual_digits=True)]
        if self.digits is Digits.GROUPS_OF_3:
            return [pre_tokenizers.Split(Regex(DIGITS_OF_THREE), "isolated")]
        return []

    def add_tokens(self, tokenizer: Tokenizer) -> None:
        """Add what is not learnt; special tokens that the model has keep their ids."""
        from tokenizers import AddedToken

        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in self.all_special_tokens()])
        tokenizer.add_tokens([AddedToken(run, normalized=False) for run in self.space_runs()])
