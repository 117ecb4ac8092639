"""Where the assistant's turns stand in a rendered conversation, for templates that mark them with nothing."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from montessori.columns import Chat
from montessori.errors import DataError
from montessori.messages import FUNCTION_ROLES, called_functions, joined
from montessori.templates import Template

# Letters and digits pass every filter of a template; no text of a user holds these.
_MARK = "montessori7c1e59turn{}end"
_MARKS = re.compile(r"montessori7c1e59turn\d+end")
# Generation prompts of reasoning models end with them, and the turns that they rewrite do not have them.
_THOUGHTS = re.compile(r"<think>\s*(</think>\s*)?$")
# Templates write anew what stands between and around them.
_THOUGHT_MARK = re.compile(r"</?think>")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# Messages from which on turns are rendered in windows.
LONG = 16


class UncuttableError(DataError):
    """The assistant's text cannot be cut out turn by turn."""


def text_of(chat: Chat, template: Template, turns: int | None = None, **options: Any) -> str:
    """The rendered first `turns` messages."""
    return template.text(chat.messages[:turns], chat.where, chat.variables, **options)


def cut(chat: Chat, template: Template, special: re.Pattern) -> list[str]:
    """The rendered text, cut: what the model reads at even places and what it writes at odd ones.

    What it writes begins where the generation prompt ends, and ends with the last special token of the turn
    (`special` matches them). Where a template rewrites earlier turns, or goes on otherwise than from its
    generation prompt, the turns are found in the conversation as it writes it whole.

    Raises DataError when they cannot be.
    """
    try:
        texts = _cut_turn_by_turn(chat, template, special)
    except UncuttableError:
        texts = _cut_whole(chat, template, special)
    _check_own(chat, template, texts)
    return texts


def _cut_turn_by_turn(chat: Chat, template: Template, special: re.Pattern) -> list[str]:
    if len(chat.messages) > LONG:
        with suppress(DataError):
            return _assembled(chat, template, special, _turns_by_window(chat, template))
    return _assembled(chat, template, special, _turns(chat, template), from_start=True)


def _turns(chat: Chat, template: Template) -> Iterator[tuple[int, str, str]]:
    """Of each labelled turn, what is read since the one before, and what is written."""
    done = ""
    for turn in _labelled(chat):
        before, after = text_of(chat, template, turn, add_generation_prompt=True), text_of(chat, template, turn + 1)
        if not before.startswith(done) or not after.startswith(before):
            raise _uncuttable(chat, turn, "rewrites earlier turns")
        yield turn, before[len(done) :], after[len(before) :]
        done = after


def _turns_by_window(chat: Chat, template: Template) -> Iterator[tuple[int, str, str]]:
    """The same of each turn of the assistant, rendered after the first messages and the answer before alone.

    Rendering all that comes before each turn takes a time that grows with their square. Where a window is written in
    another way than the whole, the parts do not add up to it.
    """
    last = -1
    for turn in answers(chat):
        recent = _recent(chat, turn)
        # The answer before, with what stands before it.
        known = recent[: len(recent) - (turn - last - 1)] if last >= 0 else []
        done = template.text(known, chat.where, chat.variables) if known else ""
        before = template.text(recent, chat.where, chat.variables, add_generation_prompt=True)
        after = template.text([*recent, chat.messages[turn]], chat.where, chat.variables)
        if not before.startswith(done) or not after.startswith(before):
            raise _uncuttable(chat, turn, "rewrites earlier turns")
        yield turn, before[len(done) :], after[len(before) :]
        last = turn


def _recent(chat: Chat, turn: int) -> list[dict[str, Any]]:
    """What comes before `turn`: all of it, of a long conversation its beginning and what follows the answer before."""
    earlier = [answer for answer in answers(chat) if answer < turn]
    if len(chat.messages) <= LONG or not earlier or earlier[0] == 0:
        return chat.messages[:turn]
    return chat.messages[: earlier[0]] + chat.messages[earlier[-1] : turn]


def answers(chat: Chat) -> list[int]:
    """Places of the assistant's messages."""
    return [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _assembled(
    chat: Chat,
    template: Template,
    special: re.Pattern,
    turns: Iterable[tuple[int, str, str]],
    from_start: bool = False,
) -> list[str]:
    """The conversation cut by `turns`, each rendered with all that comes before it if they are `from_start`."""
    labelled = _labelled(chat)
    texts: list[str] = []
    done: list[str] = []
    read = ""
    for turn, asked, written in turns:
        done += [asked, written]
        if turn not in labelled:
            read += asked + written
            continue
        _check_written(chat, turn, written)
        content = _content(chat, turn)
        if "add_generation_prompt" not in template.source and not written.lstrip().startswith(content):
            raise _uncuttable(chat, turn, "has no add_generation_prompt and writes text before the content")
        place = written.find(content)
        tail = 0 if place < 0 else place + len(content)
        end = tail + _ending(special, written[tail:])
        texts += [read + asked, written[:end]]
        read = written[end:]
    parts = "".join(done)
    # Rendering takes most of the time, and where the last message is such a turn, the whole has been rendered.
    known = from_start and labelled[-1:] == (len(chat.messages) - 1,)
    whole = parts if known else text_of(chat, template)
    if not whole.startswith(parts):
        raise _uncuttable(chat, len(chat.messages) - 1, "rewrites earlier turns")
    return [*texts, read + whole[len(parts) :]]


def _cut_whole(chat: Chat, template: Template, special: re.Pattern) -> list[str]:
    whole = text_of(chat, template)
    ends = _content_ends(chat, template, whole)
    texts: list[str] = []
    done = 0
    for turn in _labelled(chat):
        if ends.get(turn, -1) < done:
            raise _uncuttable(chat, turn, "rewrites the turn or what comes before it")
        earlier = max([done, *(end for before, end in ends.items() if before < turn)])
        start = _start(chat, turn, template, whole, earlier, ends[turn])
        end = ends[turn] + _whole_ending(chat, turn, template, special, whole[ends[turn] :])
        _check_written(chat, turn, whole[start:end])
        texts += [whole[done:start], whole[start:end]]
        done = end
    return [*texts, whole[done:]]


def _content_ends(chat: Chat, template: Template, whole: str) -> dict[int, int]:
    """By turn, where the content of the assistant ends in the `whole` text, or the name of the function that it calls.

    Found by rendering once more with a mark after each, which must change nothing else.
    """
    places = _mark_places(chat, template, whole, [_marked(message, turn) for turn, message in enumerate(chat.messages)])
    found = {turn: places.get(_MARK.format(turn), []) for turn in range(len(chat.messages))}
    # What a function returns may be written with its name; of a content that stands twice none is the place.
    return {turn: at[0] for turn, at in found.items() if len(at) == 1 or (at and not _content(chat, turn))}


def _mark_places(chat: Chat, template: Template, whole: str, messages: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Where each mark in `messages` falls in the `whole` text; nothing if the marks change it."""
    marked = template.text(messages, chat.where, chat.variables)
    if _MARKS.sub("", marked) != whole:
        return {}
    places: dict[str, list[int]] = {}
    removed = 0
    for match in _MARKS.finditer(marked):
        places.setdefault(match.group(), []).append(match.start() - removed)
        removed += len(match.group())
    return places


def _check_own(chat: Chat, template: Template, texts: list[str]) -> None:
    """Raise UncuttableError where a template writes what a function returned into the turn that called it."""
    tools = [
        turn for turn, message in enumerate(chat.messages) if message["role"] in FUNCTION_ROLES and _content(chat, turn)
    ]
    if not tools:
        return
    messages = [*chat.messages]
    for turn in tools:
        messages[turn] = {**messages[turn], "content": _ending_with(messages[turn]["content"], _MARK.format(turn))}
    places = _mark_places(chat, template, "".join(texts), messages)
    ends = list(itertools.accumulate(map(len, texts)))
    for turn in tools:
        for place in places.get(_MARK.format(turn), []):
            # Pieces at odd places are labelled; what ends where one begins lies before it.
            if bisect_left(ends, place) % 2:
                raise _uncuttable(chat, turn, "writes what a function returned into a turn of the assistant")


def _marked(message: dict[str, Any], turn: int) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    mark, content = _MARK.format(turn), message.get("content") or ""
    if joined(content).strip():
        return {**message, "content": _ending_with(content, mark)}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    first, *others = calls
    named = first.get("function") or first
    called = {**named, "name": named["name"] + mark}
    return {**message, "tool_calls": [{**first, "function": called} if first.get("function") else called, *others]}


def _ending_with(content: str | list[dict[str, str]], mark: str) -> str | list[dict[str, str]]:
    """The `content` with a mark after its last character that is not blank."""
    if isinstance(content, str):
        body = content.rstrip()
        return body + mark + content[len(body) :]
    last = max(place for place, part in enumerate(content) if part["text"].strip())
    parts: list[dict[str, Any]] = [*content]
    parts[last] = {**parts[last], "text": _ending_with(parts[last]["text"], mark)}
    return parts


def _start(chat: Chat, turn: int, template: Template, whole: str, earlier: int, end: int) -> int:
    """Where the assistant begins to write: after the generation prompt if it stands there, else with its content.

    Neither lies before `earlier`, where the assistant's turn before ends.
    """
    content = _content(chat, turn)
    shared = count_shared(whole[earlier:end][::-1], content[::-1])
    begin = end - len(whole[end - shared : end].lstrip())
    before = _content(chat, turn - 1)
    if (place := whole.find(before, earlier, begin)) >= 0:
        earlier = place + len(before)
    recent = _recent(chat, turn)
    read = template.text(recent, chat.where, chat.variables)
    asked = template.text(recent, chat.where, chat.variables, add_generation_prompt=True)
    header = asked[count_shared(read, asked) :]
    # It may end with what the content begins with, such as an opening mark of thoughts. A turn in several channels
    # holds it before each.
    place = whole.find(header, earlier, min(begin + len(header), end)) if header else -1
    if place >= 0:
        return place + len(header)
    bare = _THOUGHTS.sub("", header)
    if _has_thoughts(chat.messages[turn]) and bare and (place := whole.find(bare, earlier, end)) >= 0:
        return place + len(bare)
    if not content:
        if not bare or (place := whole.find(bare, earlier, end)) < 0:
            raise _uncuttable(chat, turn, "does not go on from its generation prompt")
        return place + len(bare)
    if shared < len(content) and turn == answers(chat)[-1]:
        # Of earlier turns a template may leave the thoughts out, as it does when the model goes on from them.
        raise _uncuttable(chat, turn, "drops a part of the content")
    # The space before a word is part of its token.
    return earlier + len(whole[earlier:begin].rstrip(" "))


def _has_thoughts(message: dict[str, Any]) -> bool:
    """Whether they stand beside the content."""
    return any(message.get(key) for key in THOUGHT_KEYS)


def lost_thoughts(chat: Chat, template: Template) -> str | None:
    """Where the last message has thoughts that the template does not write; None if it has none or they stand there.

    Of earlier messages many templates leave them out on purpose.
    """
    last = chat.messages[-1]
    told = {key: last[key].strip() for key in THOUGHT_KEYS if isinstance(last.get(key), str) and last[key].strip()}
    if not told or last["role"] != "assistant":
        return None
    whole = text_of(chat, template)
    if any(thoughts in whole for thoughts in told.values()):
        return None
    without = [*chat.messages[:-1], {key: value for key, value in last.items() if key not in told}]
    # A template may write them in another form, and then this is another text, if it can do without them at all.
    with suppress(DataError):
        return next(iter(told)) if template.text(without, chat.where, chat.variables) == whole else None
    return None


def _whole_ending(chat: Chat, turn: int, template: Template, special: re.Pattern, tail: str) -> int:
    """Characters of `tail`, which follows the content of `turn`, that still belong to it.

    As the last message the turn ends in a way of its own; what it has in common with `tail` belongs to the turn.
    """
    last = template.text([*_recent(chat, turn), _marked(chat.messages[turn], turn)], chat.where, chat.variables)
    alone = last.partition(_MARK.format(turn))[2]
    if tail.startswith(alone):
        return _ending(special, alone)
    common = [match.end() for match in special.finditer(tail[: count_shared(alone, tail)])]
    if common:
        return common[-1]
    stripped = tail.lstrip()
    if next_one := special.match(stripped):
        return len(tail) - len(stripped) + next_one.end()
    raise _uncuttable(chat, turn, "ends a turn differently when a message follows, without a special token there,")


def count_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Characters that both texts begin with, or tokens that both lists do."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _ending(special: re.Pattern, tail: str) -> int:
    """Characters of the rest of a turn up to its last special token; all of them if there is none."""
    ends = [match.end() for match in special.finditer(tail)]
    return ends[-1] if ends else len(tail)


def _labelled(chat: Chat) -> tuple[int, ...]:
    if chat.labelled[:1] == (0,):
        raise DataError(f"{chat.where}: expected another message before the assistant's first, got none")
    return chat.labelled


def _content(chat: Chat, turn: int) -> str:
    return joined(chat.messages[turn].get("content") or "").strip()


def _check_written(chat: Chat, turn: int, written: str) -> None:
    # A template may write something between the parts of a content.
    content = joined(chat.messages[turn].get("content") or "", " ")
    *thoughts, answer = _THOUGHT_MARK.split(content)
    # The last word of an answer may stand in the thoughts as well.
    place = _THOUGHT_MARK.split(written)[-1] if thoughts and answer.strip() else written
    words = _THOUGHT_MARK.sub(" ", content).split()
    # A template may take the content apart (thoughts, answer), but it does not drop the end of it.
    dropped = any(word not in place for word in words[-1:])
    if dropped or any(name not in written for name in called_functions(chat.messages[turn], chat.where)):
        raise DataError(str(_uncuttable(chat, turn, "does not write the content, or a function that is called,")))


def _uncuttable(chat: Chat, turn: int, fault: str) -> UncuttableError:
    return UncuttableError(
        f"{chat.where}: the chat template {fault} at message {turn}, so the text of the assistant cannot "
        f"be cut out; give a template with a {{% generation %}} block"
    )
