"""The tokenizer of a corpus: a byte-level BPE trained on it, or one that exists already."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ibp_deepspeed.data.corpus import END_OF_TEXT
from ibp_deepspeed.data.encoding import Row
from ibp_deepspeed.errors import DataError, first_line

SMALLEST_VOCABULARY = 257  # every byte, and the end of text
_KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>")


class TextTokenizer:
    """Turns documents into token ids, each document closed by the end-of-text id.

    Marks of the tokenizer's special tokens that occur in a text are encoded as plain text, so that a
    document cannot forge a separator; no start token is added, and nothing is padded or cut off.

    Raises DataError when the tokenizer is not a "fast" one or has no end-of-text token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(f"{name} is not a fast tokenizer: give one that has a tokenizer.json")
        vocabulary = tokenizer.get_vocab()
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token = _end_token(vocabulary, name)
        self.eos_id: int = vocabulary[tokenizer.eos_token]
        # Ids may have gaps: a model's table needs the highest id plus one, not the number of tokens.
        self.vocabulary_size: int = max(vocabulary.values()) + 1
        self._tokenizer, self._name = tokenizer, name
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[Any, str]]:
        # made again where it is unpickled, in a process that helps: the encoder's settings are not in its JSON
        return TextTokenizer, (self._tokenizer, self._name)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """One list of ids for each document, its last id `eos_id`."""
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [[*encoding.ids, self.eos_id] for encoding in encodings]

    def rows(self, texts: list[str]) -> list[Row]:
        """What `encode` gives, as rows of a token file; all tokens count."""
        return [Row(ids) for ids in self.encode(texts)]

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_messages` can be used."""
        return self._tokenizer.chat_template is not None

    def encode_messages(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> list[int]:
        """The ids of messages ("role", "content") as the chat template writes them, with its special tokens alone.

        Marks of special tokens in the messages are encoded as plain text. `add_generation_prompt` adds what an
        assistant's turn begins with. Raises what the template raises for messages that it cannot write.
        """
        options = {"add_generation_prompt": add_generation_prompt, "sanitize_control_tokens": True}
        ids: list[int] = self._tokenizer.apply_chat_template(messages, return_dict=False, **options)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included."""
        return self._encoder.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes a folder that `transformers.AutoTokenizer.from_pretrained` reads without a network."""
        self._tokenizer.save_pretrained(str(folder))


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> TextTokenizer:
    """Trains a byte-level BPE of at most `vocabulary_size` tokens (fewer when the text is small).

    Raises DataError when the vocabulary is too small for the 256 bytes and the end-of-text token.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"the vocabulary size is {vocabulary_size}, at least {SMALLEST_VOCABULARY} is needed "
            "(256 bytes and the end of text): raise --vocab-size"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return TextTokenizer(fast, "the trained tokenizer")


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Reads a Hugging Face tokenizer folder or a tokenizer.json.

    Raises DataError when there is no such file or folder, or it cannot be read as a tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a tokenizer.json or a Hugging Face tokenizer folder")
    # Its folder, when there is one, also says which token ends a text.
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").exists():
        path = path.parent
    fast: Any
    try:
        if path.is_file():
            fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return TextTokenizer(fast, str(path))
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises the bare class
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"{path} cannot be read as a tokenizer ({reason}): give a tokenizer.json or a Hugging Face tokenizer folder"
        ) from error


def _end_token(vocabulary: dict[str, int], name: str) -> str:
    for token in _KNOWN_END_TOKENS:
        if token in vocabulary:
            return token
    raise DataError(
        f"{name} names no end-of-text token and has none of {', '.join(_KNOWN_END_TOKENS)}: "
        "give a Hugging Face tokenizer folder whose tokenizer_config.json has an eos_token"
    )
