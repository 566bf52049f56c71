"""Text to ids and back for Qwen audio checkpoints: byte-level BPE with control ids that text can never reach."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile

from rlaudio.errors import CheckpointError
from rlaudio.models.base import SpecialIds
from rlaudio.models.tokenizers import TOKENIZER_FILE, ControlledTokenizer, read_tokenizer_file

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
AUDIO_PAD, AUDIO_START, AUDIO_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, AUDIO_PAD, AUDIO_START, AUDIO_END)
"""In both public vocabularies, from id 151643 on."""


class QwenTokenizer(ControlledTokenizer):
    """The common tokenizer with Qwen's special ids; `<think>` is ordinary text to it."""

    def __init__(self, tokenizer: TokenizerFile, *, num_embeddings: int, origin: str = "tokenizer") -> None:
        """`num_embeddings` is the decoder's vocabulary, which is larger than the tokenizer's; `origin` names the file.

        Raises:
            CheckpointError: a control token is missing, or an id has no embedding.
        """
        super().__init__(tokenizer, ids=_special_ids(tokenizer, num_embeddings=num_embeddings, origin=origin))

    @classmethod
    def load(cls, path: Path, *, num_embeddings: int) -> QwenTokenizer:
        """Read the tokenizer of the checkpoint folder `path`. Raises CheckpointError: missing or incomplete."""
        file = read_tokenizer_file(path, family="Qwen audio")
        return cls(file, num_embeddings=num_embeddings, origin=str(path / TOKENIZER_FILE))


def build_byte_tokenizer() -> TokenizerFile:
    """A tokenizer of Qwen's kind that has learnt no merge: 256 bytes, then the control tokens. For tests."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = TokenizerFile(models.BPE(vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def build_word_tokenizer(words: list[str]) -> TokenizerFile:
    """A tokenizer of whole words, for small checkpoints: `words` in order, duplicates dropped, then the control tokens.

    Tags such as `</think>` may be among them and are ordinary words, as in public vocabularies ordinary text. What is
    not among them is `<unk>`, which no text spells and no policy samples.
    """
    control = (*CONTROL_TOKENS, UNKNOWN)
    ordinary = [word for word in dict.fromkeys(("\n", *words)) if word not in control]
    vocabulary = {token: index for index, token in enumerate((*ordinary, *control))}
    tokenizer = TokenizerFile(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(r"</?\w+>|[<>]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _special_ids(tokenizer: TokenizerFile, *, num_embeddings: int, origin: str) -> SpecialIds:
    def find(name: str) -> int:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise CheckpointError(f"{origin} has no token {name}: not a Qwen audio tokenizer, or an incomplete one")
        return token_id

    pad, turn_start, turn_end, audio_pad, audio_start, audio_end = map(find, CONTROL_TOKENS)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > num_embeddings:
        raise CheckpointError(f"{origin} has ids up to {size - 1}, config.json has {num_embeddings} embeddings")
    stop = (turn_end, pad)
    control = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # Behind the tokenizer's last id lie embeddings that no text belongs to.
    banned = (control | set(range(size, num_embeddings))) - set(stop)
    return SpecialIds(
        turn_start=turn_start,
        turn_end=turn_end,
        audio_start=audio_start,
        audio_pad=audio_pad,
        audio_end=audio_end,
        think_start=None,
        think_end=None,
        pad=pad,
        stop=stop,
        banned=tuple(sorted(banned | {turn_start, audio_pad, audio_start, audio_end})),
    )
