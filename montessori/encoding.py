"""From rows of text to token ids and labels, by the roles of the text and never by searching in tokens.

A conversation is rendered with a chat template and cut into pieces, by role, while it is still text.
Each piece is tokenised on its own, the way the model meets it: it reads the prompt, then writes the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from montessori.batching import IGNORE_INDEX, Example, examples_from_tokens
from montessori.cutting import cut, text_of
from montessori.data import TOKEN_COLUMNS, Chat, Rows, column_set, read_chat
from montessori.errors import ArgumentError, DataError
from montessori.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "right", "skip")
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Bounds the memory of the tokenizer's own output, which is many times that of the ids.
ROWS_PER_CALL = 512


@dataclass(frozen=True)
class Encoded:
    """What `encode_rows` made of `num_rows` rows. Every row is in `examples` or in `skipped`.

    `examples` are in the order of the input, `Example.index` is the row number. `skipped` maps a row
    number to "no_label_tokens" (nothing enters the loss) or "too_long". `truncated` lists the row numbers
    of the examples whose end was cut off, and of none that was skipped.
    """

    examples: list[Example]
    skipped: dict[int, str]
    truncated: list[int]
    num_rows: int


def encode_rows(
    rows: Rows | Sequence[dict],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    truncation: str = "error",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "candidates",
) -> Encoded:
    """Token ids and labels of `rows`: a label is the token itself where the assistant wrote it, else -100.

    A row holds `input_ids`, `labels` and, optionally, `attention_mask`; or `messages`; or `prompt` and
    `completion` (texts or lists of messages); or `instruction`, optionally `input`, and `response`. The
    first of these sets that is complete counts. A row of text may tell its template more: by names and
    values in `chat_template_kwargs` and, where it has messages, by `tools`, a list of JSON schemas or its
    JSON text. A message of the assistant holds `content`, `tool_calls`, or both.

    Labels of an assistant's turn end with its last special token; what the template writes after it (often
    a newline) has no label. Of `prompt` and `completion` as lists of messages only the turns of `completion`
    are labelled. A template with a {% generation %} block decides itself which tokens are labelled. One that
    rewrites earlier turns (thoughts left out, an end of text after the last) is read as it writes the whole.

    `chat_template` is a Jinja template, a path to a .jinja file, or "chatml" or "plain" (for base models:
    instruction, newline, response, end of text); without it the tokenizer's own is used. Special tokens
    come from the template alone; the two built-in ones start with the token that begins a text if this
    tokenizer puts one there. `chat_template_kwargs`, such as {"enable_thinking": False}, hold for all rows
    but those that say otherwise. `max_length` is in tokens; an example beyond it is an error, is cut at the
    end ("right") or is left out ("skip"). `name` is how errors call rows without an address.

    Raises DataError, naming file and line, for a row or a template that cannot be used; ArgumentError for
    a wrong `max_length`, `truncation`, `chat_template` or `chat_template_kwargs`.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ArgumentError(f"max_length={max_length!r}: expected a positive number of tokens")
    if truncation not in TRUNCATIONS:
        raise ArgumentError(f"truncation={truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
    table = rows if isinstance(rows, Rows) else Rows(rows, source=name)
    examples: dict[int, Example] = {}
    chats: list[Chat] = []
    for index, row in enumerate(table):
        columns = column_set(row, table.where(index))
        if columns == TOKEN_COLUMNS:
            examples[index] = _from_tokens(row, index, table.where(index))
        else:
            chats.append(read_chat(row, columns, index, table.where(index)))
    if chats:
        if tokenizer is None:
            raise ArgumentError(f"{table.where(chats[0].index)}: a row of text needs tokenizer=, none was given")
        template = Template.of(tokenizer, chat_template, chat_template_kwargs)
        encode = _encode_marked if GENERATION_BLOCK.search(template.source) else _encode_cut
        examples.update((example.index, example) for example in encode(chats, template))
    return _limit([examples[index] for index in range(len(table))], table, max_length, truncation)


def encode_continuations(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, name: str = "rows"
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each (prompt, completion), both texts as a model read and wrote them.

    The prompt's ids are those of the prompt alone, `tokenizer(prompt, add_special_tokens=False)`, which is
    what generation feeds; the completion is tokenised on its own after it, so that no token spans the two.
    """
    pieces = _Pieces.of(tokenizer)
    encoded: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(texts), ROWS_PER_CALL):
        group = texts[start : start + ROWS_PER_CALL]
        places = [Chat(start + i, f"{name}, row {start + i}", []) for i in range(len(group))]
        tokens = pieces.tokenise([list(pair) for pair in group], places)
        encoded += [(prompt, completion) for prompt, completion in tokens]
    return encoded


def _limit(examples: list[Example], table: Rows, max_length: int, truncation: str) -> Encoded:
    """Apply the limit of length; an example without labels is skipped for that, whatever its length."""
    encoded = Encoded([], {}, [], len(examples))
    for example in examples:
        too_long = example.num_tokens > max_length
        if too_long and truncation == "error" and example.num_label_tokens:
            raise DataError(
                f"{table.where(example.index)}: expected at most {max_length} tokens, got "
                f"{example.num_tokens}; raise --max-length, or pass --truncation right (cuts the end) or "
                f"skip (leaves the row out)"
            )
        kept = replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])
        if example.num_label_tokens and too_long and truncation == "skip":
            encoded.skipped[example.index] = "too_long"
        elif kept.num_label_tokens == 0:
            encoded.skipped[example.index] = "no_label_tokens"
        else:
            encoded.examples.append(kept)
            if too_long:
                encoded.truncated.append(example.index)
    return encoded


def _from_tokens(row: Mapping, index: int, where: str) -> Example:
    columns = {key: value for key, value in row.items() if value is not None}
    try:
        (example,) = examples_from_tokens([columns], where)
    except DataError as error:
        # The row number in the message counts within the list of one row passed above.
        raise DataError(f"{where}{str(error).removeprefix(f'{where} row 0')}") from error
    return replace(example, index=index)


# Templates that mark the assistant's text with {% generation %}.


def _encode_marked(chats: list[Chat], template: Template) -> Iterator[Example]:
    if not template.tokenizer.is_fast:
        raise DataError(
            "the chat template has a {% generation %} block: expected a fast tokenizer, got a slow one; load "
            "the fast one or give a template without that block"
        )
    for chat in chats:
        output = template.apply(
            chat.messages,
            chat.where,
            chat.variables,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        mask = torch.tensor(output["assistant_masks"], dtype=torch.bool)
        if any(message["role"] == "assistant" for message in chat.messages[: chat.first_labelled]):
            starts = torch.tensor([start for start, _ in output["offset_mapping"]])
            mask &= starts >= _prompt_length(chat, template)
        if not mask.any():
            raise DataError(
                f"{chat.where}: the chat template marks no token with {{% generation %}}; put the content of "
                f"the assistant inside that block"
            )
        input_ids = torch.tensor(output["input_ids"], dtype=torch.int64)
        yield Example(input_ids, torch.where(mask, input_ids, IGNORE_INDEX), chat.index)


def _prompt_length(chat: Chat, template: Template) -> int:
    """Characters of the rendered prompt."""
    prompt = text_of(chat, template, chat.first_labelled)
    if not text_of(chat, template).startswith(prompt):
        raise DataError(
            f"{chat.where}: the chat template rewrites the prompt once the completion follows; give a "
            f"template that does not, or a prompt without turns of the assistant"
        )
    return len(prompt)


# Templates that mark nothing: the text is cut where the generation prompt ends.


def _encode_cut(chats: list[Chat], template: Template) -> Iterator[Example]:
    pieces = _Pieces.of(template.tokenizer)
    for start in range(0, len(chats), ROWS_PER_CALL):
        group = chats[start : start + ROWS_PER_CALL]
        cuts = [cut(chat, template, pieces.special) for chat in group]
        for chat, parts in zip(group, pieces.tokenise(cuts, group), strict=True):
            labels = [ids if place % 2 else [IGNORE_INDEX] * len(ids) for place, ids in enumerate(parts)]
            input_ids = torch.tensor([*chain(*parts)], dtype=torch.int64)
            yield Example(input_ids, torch.tensor([*chain(*labels)], dtype=torch.int64), chat.index)


@dataclass(frozen=True)
class _Pieces:
    """Tokenises the pieces of a text as they stand in it.

    `special_tokens` has the longest first, `special` matches them. `begins_words` says that the tokenizer
    puts a word boundary before every text it is given, as SentencePiece does; a piece that continues a
    text must not get one.
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: tuple[str, ...]
    special: re.Pattern
    begins_words: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Pieces:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special_tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, special_tokens)) or "(?!)"
        pieces = cls(tokenizer, tuple(special_tokens), re.compile(pattern))
        line, *alone = pieces.ids(["\n", "a", "1", "("])
        joined = pieces.ids(["\na", "\n1", "\n("])
        apart = any(both == line + after for both, after in zip(joined, alone, strict=True))
        return replace(pieces, begins_words=not apart)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text taken alone, without the special tokens a tokenizer puts around a text."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def tokenise(self, cuts: list[list[str]], chats: list[Chat]) -> list[list[list[int]]]:
        """Ids of every piece of every text; `chats` give the addresses for errors."""
        contexts = [[self._context("".join(texts[:place])) for place in range(len(texts))] for texts in cuts]
        used = sorted({*chain(*contexts)})
        context_ids = dict(zip(used, self.ids(used), strict=True))
        flat = iter(self.ids([*map(str.__add__, chain(*contexts), chain(*cuts))]))
        return [
            [_without(context_ids[context], next(flat), chat) for context in row]
            for row, chat in zip(contexts, chats, strict=True)
        ]

    def _context(self, before: str) -> str:
        """What to put before a piece so that it is tokenised as in the middle of a text."""
        ending = next((token for token in self.special_tokens if before.endswith(token)), "")
        return ending or ("\n" if before and self.begins_words else "")


def _without(context: list[int], ids: list[int], chat: Chat) -> list[int]:
    if ids[: len(context)] != context:
        raise DataError(
            f"{chat.where}: the tokenizer merges the pieces that the chat template is cut into; give a "
            f"template with a {{% generation %}} block"
        )
    return ids[len(context) :]
