"""From dialogues to tokens, and which of these an assistant wrote: they alone count in the loss."""

from pathlib import Path

from ibp_deepspeed.data.dialogues import ASSISTANT, Dialogue
from ibp_deepspeed.data.encoding import Row
from ibp_deepspeed.data.tokenizer import TextTokenizer
from ibp_deepspeed.errors import DataError, first_line


class DialogueTokenizer:
    """Turns dialogues into rows with the tokenizer's chat template, or joins prompt and response if it has none.

    With a template a row is what `apply_chat_template` gives, and what counts is what it adds for each message of
    an assistant to a prompt for it, the end of the turn included. Without one a row is prompt, response and eos_id,
    with nothing between or before them; response and eos_id count. Text can forge special tokens in neither.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.vocabulary_size = tokenizer.vocabulary_size
        self.eos_id = tokenizer.eos_id
        self._tokenizer = tokenizer

    def rows(self, dialogues: list[Dialogue]) -> list[Row]:
        """One row for each dialogue.

        Raises DataError, which says where the dialogue is, for messages without a template, or that the template
        cannot write, or does not write as the beginning of what it writes when they continue.
        """
        return [self._chat(d) if self._tokenizer.has_chat_template else self._joined(d) for d in dialogues]

    def save(self, folder: Path) -> None:
        self._tokenizer.save(folder)

    def _joined(self, dialogue: Dialogue) -> Row:
        if not dialogue.is_pair:
            raise DataError(
                f"{dialogue.where} has messages, and the tokenizer has no chat template to write them with: "
                'give rows of "prompt" and "response", or a tokenizer folder that has a chat template'
            )
        prompt, response = self._tokenizer.encode([message["content"] for message in dialogue.messages])
        prompt.pop()  # the end of the text
        return Row([*prompt, *response], [False] * len(prompt) + [True] * len(response))

    def _chat(self, dialogue: Dialogue) -> Row:
        ids = self._encode(dialogue, len(dialogue.messages))
        counts = [False] * len(ids)
        for turn, message in enumerate(dialogue.messages):
            if message["role"] != ASSISTANT:
                continue
            if turn == 0:
                raise DataError(
                    f"{dialogue.where} begins with an {ASSISTANT}'s message: begin with a user's or system's"
                )
            before, after = self._encode(dialogue, turn, prompt=True), self._encode(dialogue, turn + 1)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise DataError(
                    f"{dialogue.where}: the tokens of message {turn + 1} cannot be told apart, because the chat "
                    "template does not write messages as the beginning of what it writes when they continue: "
                    "divide the row at that message, or use another chat template"
                )
            counts[len(before) : len(after)] = [True] * (len(after) - len(before))
        if not any(counts[1:]):
            raise DataError(
                f"{dialogue.where} has no token of a response in what the chat template writes: mend either"
            )
        return Row(ids, counts)

    def _encode(self, dialogue: Dialogue, count: int, *, prompt: bool = False) -> list[int]:
        """The ids of the first messages, and if `prompt` of what an assistant's turn begins with."""
        try:
            return self._tokenizer.encode_messages(dialogue.messages[:count], add_generation_prompt=prompt)
        except Exception as error:  # a template may fail in any way at fields that it does not expect
            reason = first_line(error).rstrip(".")
            raise DataError(
                f"{dialogue.where} cannot be written by the tokenizer's chat template ({reason}): mend the row"
            ) from error
