"""From rows of text to token ids and labels, by the roles of the text and never by searching in tokens.

A conversation is rendered with a chat template and cut into pieces, by role, while it is still text.
Each piece is tokenised on its own, the way the model meets it: it reads the prompt, then writes the answer.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from montessori.bars import progress_bar
from montessori.batching import IGNORE_INDEX, Example, examples_from_tokens
from montessori.column_use import ColumnUse
from montessori.columns import TEXT_COLUMNS, Chat, Text, column_set, read_chat, read_text
from montessori.cutting import count_shared, cut, lost_thoughts
from montessori.errors import ArgumentError, DataError, DataWarning
from montessori.files import Rows
from montessori.marking import marked_example
from montessori.templates import NO_TEMPLATE, Template
from montessori.wording import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "right", "skip")
INVALID_ROWS = ("error", "skip")
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Told how many rows more are done.
_Tick = Callable[[int], object]
# Bounds the memory of the tokenizer's own output, which is many times that of the ids.
ROWS_PER_CALL = 512
# Before progress is shown on a terminal: most tables are read by then.
SECONDS_UNSHOWN = 1


@dataclass(frozen=True)
class Encoded:
    """What `encode_rows` made of `num_rows` rows. Every row is in `examples` or in `skipped`.

    `examples` are in the order of the input, `Example.index` is the row number. `skipped` maps a row
    number to "no_label_tokens" (nothing enters the loss), "too_long" or "invalid"; `reasons` says of each
    invalid row in one line what is wrong with it. `truncated` lists the row numbers of the examples whose
    end was cut off, and of none that was skipped. `columns` says which columns were read, `reader` by which estimator's
    settings, if by any.
    """

    examples: list[Example]
    skipped: dict[int, str]
    truncated: list[int]
    num_rows: int
    reasons: dict[int, str] = field(default_factory=dict)
    columns: ColumnUse = field(default_factory=ColumnUse)
    reader: object = field(default=None, repr=False, compare=False)


def encode_rows(
    rows: Rows | Sequence[dict],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    truncation: str = "error",
    invalid_rows: str = "error",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "candidates",
    progress: bool = False,
) -> Encoded:
    """Token ids and labels of `rows`: a label is the token itself where the assistant wrote it, else -100.

    A row holds `input_ids`, `labels` and, optionally, `attention_mask`; or `messages`; or `prompt` and
    `completion` (texts or lists of messages); or `instruction`, optionally `input`, and `response`; or
    `conversations`, messages as ShareGPT writes them; or another of `montessori.columns.COLUMN_SETS`; or `text`.
    The first of these sets that is complete counts. Beside them `system` (or `system_prompt`) and `history`, pairs
    of texts, hold what comes before. A row of text may tell its template more: by names and values in
    `chat_template_kwargs` and, where it has messages, by `tools`, a list of JSON schemas or its JSON text. A message
    of the assistant holds `content`, `tool_calls`, or both, and `weight` (`loss`, `train`, `training`) of 0 where it
    has no label; a content may be a list of parts {"type": "text", "text": ...}, and a text is given as one part
    to a template that writes only parts.

    Labels of an assistant's turn end with its last special token; what the template writes after it (often
    a newline) has no label. Of `prompt` and `completion` as lists of messages only the turns of `completion`
    are labelled. A template with a {% generation %} block decides itself which tokens are labelled. One that
    rewrites earlier turns (thoughts left out, an end of text after the last) is read as it writes the whole.

    `chat_template` is a Jinja template, a path to a .jinja file, or "chatml" or "plain" (for base models:
    instruction, newline, response, end of text); without it the tokenizer's own is used. Special tokens
    come from the template alone; the two built-in ones start with the token that begins a text if this
    tokenizer puts one there. `chat_template_kwargs`, such as {"enable_thinking": False}, hold for all rows
    but those that say otherwise.

    With `chat_template="none"` texts are taken as they stand, as TRL takes prompts and completions that are
    texts: the ids are `tokenizer(prompt + completion + eos_token)`, special tokens of the tokenizer included,
    and labels begin where they part from `tokenizer(prompt)`; so of instruction (a blank line before its
    input) and response. The end of text is not written twice. Messages are refused. Whatever the template, a
    `text` is `tokenizer(text + eos_token)`, every token labelled.

    `max_length` is in tokens; an example beyond it is an error, is cut at the end ("right") or is left out
    ("skip"). With `invalid_rows="skip"` a row that is no example (columns missing, no answer, messages
    malformed or such as its template refuses) is left out; what fails for any row, such as a template that
    is broken, is an error all the same. `name` is how errors call rows without an address. With `progress` a bar
    shows how many rows are read, if it takes long.

    Raises DataError, naming file and line, for a row or a template that cannot be used; ArgumentError for
    a wrong `max_length`, `truncation`, `invalid_rows`, `chat_template` or `chat_template_kwargs`. Warns
    (DataWarning) of thoughts beside the content of a last message that the template does not write.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ArgumentError(f"max_length={max_length!r}: expected a positive number of tokens")
    if truncation not in TRUNCATIONS:
        raise ArgumentError(f"truncation={truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
    if invalid_rows not in INVALID_ROWS:
        raise ArgumentError(f"invalid_rows={invalid_rows!r}: expected one of {', '.join(INVALID_ROWS)}")
    if chat_template == NO_TEMPLATE and chat_template_kwargs:
        raise ArgumentError("chat_template_kwargs: chat_template='none' is no template that could be told; remove them")
    table = rows if isinstance(rows, Rows) else Rows(rows, source=name)
    invalid = _Invalid(invalid_rows == "skip")
    examples: dict[int, Example] = {}
    chats: list[Chat] = []
    texts: list[Text] = []
    use = ColumnUse()
    with progress_bar("reading", len(table), "row", progress, delay=SECONDS_UNSHOWN) as bar:
        for index, row in enumerate(table):
            where = table.where(index)
            with invalid.kept_out(index):
                columns = column_set(row, where)
                use.add(row, columns)
                if columns[0] == "input_ids":
                    examples[index] = _from_tokens(row, index, where)
                    bar.update()
                elif columns == TEXT_COLUMNS or chat_template == NO_TEMPLATE:
                    texts.append(read_text(row, columns, index, where))
                else:
                    chats.append(read_chat(row, columns, index, where))
        bar.update(len(invalid.reasons))
        if tokenizer is None and (chats or texts):
            first = min([chat.index for chat in chats[:1]] + [text.index for text in texts[:1]])
            raise ArgumentError(f"{table.where(first)}: a row of text needs tokenizer=, none was given")
        if tokenizer is not None and texts:
            examples |= _encode_texts(texts, tokenizer, bar.update)
        if tokenizer is not None and chats:
            template = Template.of(tokenizer, chat_template, chat_template_kwargs)
            examples |= _encode_chats(chats, template, invalid, bar.update)
    return replace(_limit(examples, table, max_length, truncation, invalid.reasons), columns=use)


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
        tokens = pieces.tokenise([list(pair) for pair in group])
        for place, row in zip(places, tokens, strict=True):
            prompt, completion = (_without(context, ids, place) for context, ids in row)
            encoded.append((prompt, completion))
    return encoded


class _Invalid:
    """Rows that are no examples: their errors are raised or, with `skip`, noted in `reasons` by row number."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.reasons: dict[int, str] = {}

    @contextmanager
    def kept_out(self, index: int) -> Iterator[None]:
        """What is done here to the row `index` fails for that row alone."""
        try:
            yield
        except DataError as error:
            if not self.skip:
                raise
            self.reasons[index] = str(error)


def _limit(
    examples: Mapping[int, Example], table: Rows, max_length: int, truncation: str, reasons: Mapping[int, str]
) -> Encoded:
    """Apply the limit of length; an example without labels is skipped for that, whatever its length."""
    encoded = Encoded([], {}, [], len(table), dict(sorted(reasons.items())))
    for index in range(len(table)):
        if index in reasons:
            encoded.skipped[index] = "invalid"
            continue
        example = examples[index]
        too_long = example.num_tokens > max_length
        num_labels = example.num_label_tokens
        if too_long and truncation == "error" and num_labels:
            raise DataError(
                f"{table.where(index)}: expected at most {max_length} tokens, got "
                f"{example.num_tokens}; raise max_length (--max-length), or cut the end with truncation='right' "
                "(--truncation right), or leave a candidate out with 'skip'"
            )
        if too_long and truncation == "skip" and num_labels:
            encoded.skipped[index] = "too_long"
            continue
        if too_long:
            example = replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])
            num_labels = example.num_label_tokens
        if num_labels == 0:
            encoded.skipped[index] = "no_label_tokens"
            continue
        encoded.examples.append(example)
        if too_long:
            encoded.truncated.append(index)
    return encoded


def _from_tokens(row: Mapping, index: int, where: str) -> Example:
    columns = {key: value for key, value in row.items() if value is not None}
    try:
        (example,) = examples_from_tokens([columns], where)
    except DataError as error:
        # The row number in the message counts within the list of one row passed above.
        raise DataError(f"{where}{str(error).removeprefix(f'{where} row 0')}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: expected flat lists of integers ({one_line(error)})") from error
    return replace(example, index=index)


# Texts without a template.


def _encode_texts(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tick: _Tick) -> dict[int, Example]:
    eos = tokenizer.eos_token
    if eos is None:
        raise DataError("texts without a chat template: expected a tokenizer with an eos_token, got None; set one")
    examples = {}
    for start in range(0, len(texts), ROWS_PER_CALL):
        group = texts[start : start + ROWS_PER_CALL]
        ends = ["" if text.labelled.endswith(eos) else eos for text in group]
        whole = [f"{text.prompt or ''}{text.labelled}{end}" for text, end in zip(group, ends, strict=True)]
        all_ids = tokenizer(whole, verbose=False)["input_ids"]
        prompts = tokenizer([text.prompt or "" for text in group], verbose=False)["input_ids"]
        for text, ids, prompt in zip(group, all_ids, prompts, strict=True):
            input_ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
            labels = input_ids.clone()
            # A token may span both, or end the prompt where a text ends: labels begin where the ids part.
            labels[: 0 if text.prompt is None else count_shared(prompt, ids)] = IGNORE_INDEX
            examples[text.index] = Example(input_ids, labels, text.index)
        tick(len(group))
    return examples


# Conversations.

# What any template can render.
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}]


def _encode_chats(chats: list[Chat], template: Template, invalid: _Invalid, tick: _Tick) -> dict[int, Example]:
    encode = _encode_marked if GENERATION_BLOCK.search(template.source) else _encode_cut
    examples = encode(chats, template, invalid, tick)
    if not examples:
        _check_usable(encode, chats[0], template, invalid.reasons[chats[0].index])
    _warn_of_lost_thoughts([chat for chat in chats if chat.index in examples], template)
    return examples


def _warn_of_lost_thoughts(chats: list[Chat], template: Template) -> None:
    lost = [(chat.where, key) for chat in chats if (key := lost_thoughts(chat, template))]
    if lost:
        (where, key), *more = lost
        others = f" (nor those of {len(more)} other row{'s' * (len(more) > 1)})" if more else ""
        warnings.warn(
            f"{where}: the chat template does not write the thoughts in {key} of the last message{others}, and the "
            "model sees the answer without them; give a template that does, or write them into the content",
            DataWarning,
            stacklevel=4,
        )


def _check_usable(encode: Callable[..., object], chat: Chat, template: Template, reason: str) -> None:
    """Raise DataError for the `reason` of `chat` if it is the template or the tokenizer that fails, not the row."""
    try:
        encode([replace(chat, messages=_PROBE, labelled=(1,))], template, _Invalid(skip=False), lambda _: None)
    except DataError as error:
        raise DataError(reason) from error


# Templates that mark the assistant's text with {% generation %}.


def _encode_marked(chats: list[Chat], template: Template, invalid: _Invalid, tick: _Tick) -> dict[int, Example]:
    if not template.tokenizer.is_fast:
        raise DataError(
            "the chat template has a {% generation %} block: expected a fast tokenizer, got a slow one; load "
            "the fast one or give a template without that block"
        )
    examples = {}
    for chat in chats:
        with invalid.kept_out(chat.index):
            examples[chat.index] = marked_example(chat, template)
        tick(1)
    return examples


# Templates that mark nothing: the text is cut where the generation prompt ends.


def _encode_cut(chats: list[Chat], template: Template, invalid: _Invalid, tick: _Tick) -> dict[int, Example]:
    pieces = _Pieces.of(template.tokenizer)
    examples = {}
    for start in range(0, len(chats), ROWS_PER_CALL):
        group: list[Chat] = []
        cuts: list[list[str]] = []
        called = chats[start : start + ROWS_PER_CALL]
        for chat in called:
            with invalid.kept_out(chat.index):
                cuts.append(cut(chat, template, pieces.special))
                group.append(chat)
        for chat, parts in zip(group, pieces.tokenise(cuts), strict=True):
            with invalid.kept_out(chat.index):
                examples[chat.index] = _cut_example(chat, parts)
        tick(len(called))
    return examples


def _cut_example(chat: Chat, parts: _Tokens) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    for place, (context, both) in enumerate(parts):
        ids = _without(context, both, chat)
        input_ids += ids
        labels += ids if place % 2 else [IGNORE_INDEX] * len(ids)
    columns = [torch.tensor(column, dtype=torch.int64, device="cpu") for column in (input_ids, labels)]
    return Example(columns[0], columns[1], chat.index)


# Of every piece of a text, the ids of its context and those of the context with the piece.
_Tokens = Sequence[tuple[list[int], list[int]]]


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
        # Tokenizers fail on no text at all.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def tokenise(self, cuts: list[list[str]]) -> list[_Tokens]:
        """Of every text, what `_without` finds the ids of its pieces in."""
        contexts = [[self._context("".join(texts[:place])) for place in range(len(texts))] for texts in cuts]
        used = sorted({*itertools.chain(*contexts)})
        context_ids = dict(zip(used, self.ids(used), strict=True))
        flat = iter(self.ids([*map(str.__add__, itertools.chain(*contexts), itertools.chain(*cuts))]))
        return [[(context_ids[context], next(flat)) for context in row] for row in contexts]

    def _context(self, before: str) -> str:
        """What to put before a piece so that it is tokenised as in the middle of a text."""
        ending = next((token for token in self.special_tokens if before.endswith(token)), "")
        return ending or ("\n" if before and self.begins_words else "")


def _without(context: list[int], ids: list[int], chat: Chat) -> list[int]:
    """The ids of a piece from those of its context and of both; DataError where the two are merged."""
    if ids[: len(context)] != context:
        raise DataError(
            f"{chat.where}: the tokenizer merges the pieces that the chat template is cut into; give a "
            f"template with a {{% generation %}} block"
        )
    return ids[len(context) :]
