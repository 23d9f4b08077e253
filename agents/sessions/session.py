"""One episode's session: answers a program's requests, and records the tokens of every answer that it was given.

A request goes on from the recorded answer that its conversation begins with, if there is one: behind the very tokens
that were sampled. Any other conversation begins a line of its own. So does one that goes on from an answer which has
been gone on from already, or whose beginning the chat template rewrites.

    request ---> known: the last answer of its line ----------> appended to the line
                 known: an earlier answer, or a busy line ----> a new line with the tokens up to there
                 known: rewritten by the template ------------> a new line, rendered whole
                 unknown -------------------------------------> a new line, rendered whole

What was sampled for a client that went away is kept for its next try, and belongs to no line until it was delivered.
A program that holds its tokens itself may ask with tokens: it goes on from the longest line that they begin with.

The module is long because both kinds of requests write the same lines, and every rule about one reads them.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime
from polyturn.agents.dialects import Dialect
from polyturn.agents.episode import derive_seed
from polyturn.agents.episode_record import addressed
from polyturn.agents.ledger import Ledger, Segment
from polyturn.agents.policy import Generation, NoSlot, PolicyFault, SamplingParams, TokenPolicy
from polyturn.agents.sessions.matching import ConversationTree, MessageKey, exact, tools_key
from polyturn.agents.sessions.requests import Completion, CompletionRequest, RequestRefused
from polyturn.agents.turn_generation import Interruption, generate_turn, render_ids
from polyturn.agents.turns import History
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.tools.thoughts import split_thought
from polyturn.tools.types import ToolSpec

FinishedBy = Literal["stop", "length", "tool_calls"]
BUSY_RETRY_S = 1.0
"""After so long a client may ask again that found no slot."""


@dataclass(kw_only=True, slots=True, eq=False)
class Line:
    """A linear run of tokens: one conversation as far as it was gone on with, without its branches."""

    ledger: Ledger = field(default_factory=Ledger)
    messages: tuple[Message, ...] = ()
    """The conversation, its answers included."""
    tools: tuple[ToolSpec, ...] = ()
    conversation: int
    """The number of the conversation that it is a line of; branches have that of the line that they come from."""
    num_answers: int = 0
    is_busy: bool = False
    """Whether an answer is on its way that is to be appended."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Place:
    """Where an answer ends."""

    line: Line
    num_tokens: int
    messages: tuple[Message, ...]
    """The conversation as it was recorded, the answer included."""
    history: History
    """The same as the chat template sees it."""


class _Identity(NamedTuple):
    """What equal requests have in common."""

    tools: Hashable
    messages: tuple[Hashable, ...]
    max_tokens: int | None
    stop: tuple[str, ...]

    @classmethod
    def of(cls, request: CompletionRequest) -> _Identity:
        """That of a request."""
        messages = tuple(exact(message) for message in request.messages)
        return cls(tools_key(request.tools), messages, request.max_tokens, request.stop)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Prompt:
    """What an answer is sampled behind."""

    messages: tuple[Message, ...]
    """The conversation, as far as it is recorded in the words of the record."""
    new: tuple[Message, ...]
    """What of it has to be rendered."""
    tools: tuple[ToolSpec, ...]
    tools_key: Hashable
    history: History
    parent: _Place | None
    """The answer that it goes on from; None: it begins a conversation."""
    is_behind: bool
    """Whether `new` stands behind the tokens of the parent, and is not all of the conversation."""
    extends: bool
    """Whether it is to be appended to the parent's line."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Answer:
    """An answer that was sampled, and what is recorded of it once it is delivered."""

    prompt: _Prompt
    generation: Generation
    completion: Completion


@dataclass(kw_only=True, slots=True, eq=False)
class _Asked:
    """A request that is being answered, or was."""

    answer: asyncio.Task[_Answer]
    num_waiting: int = 0
    is_delivered: bool = False

    @property
    def has_failed(self) -> bool:
        return self.answer.done() and (self.answer.cancelled() or self.answer.exception() is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionCounts:
    """What happened in a session."""

    num_answers: int
    num_conversations: int
    num_side_calls: int
    """Conversations of one answer for which no tools were offered, beside the main one: titles, summaries."""
    num_branches: int
    """Lines that go on from an earlier answer, or were rewritten by the template."""
    num_refused: int
    num_retried: int
    """Requests that were answered with what had been sampled for them before."""
    num_lost_tokens: int
    """Sampled for clients that never came back for them: they are trained on by nobody."""


class Session:
    """Answers the requests of one episode; the `Completer` of a program."""

    def __init__(
        self,
        *,
        session_id: str,
        policy: TokenPolicy,
        renderer: ChatRenderer,
        dialect: Dialect,
        limits: EpisodeLimits,
        sampling: SamplingParams,
        clock: EpisodeTime,
        seed: int,
        rule: MessageKey,
        on_answer: Callable[[AssistantMessage, tuple[Message, ...]], None],
    ) -> None:
        """
        Args:
            session_id: Begins the ids of completions.
            limits: `max_turns` answers in all; `max_tokens_per_episode` bounds each line.
            sampling: As for `play_tokens`: what clients ask for does not change it.
            seed: Of the n-th request `derive_seed(seed, n, 0)`.
            rule: What two messages have in common that are one and the same.
            on_answer: Called with each answer that was delivered, and the messages that it answers.
        """
        self._id = session_id
        self._policy, self._renderer, self._dialect = policy, renderer, dialect
        self._limits, self._sampling, self._clock, self._seed = limits, sampling, clock, seed
        self._tree: ConversationTree[_Place] = ConversationTree(rule)
        self._on_answer = on_answer
        self._asked: dict[_Identity, list[_Asked]] = {}
        self._lines: list[Line] = []
        self._last_messages: dict[int, AssistantMessage] = {}
        self._num_asked = self._num_open = self._num_refused = self._num_retried = self._num_calls = 0
        self.num_answers = 0
        """Answers that were delivered."""
        self.num_busy = 0
        """Requests that are being answered."""
        self.on_busy: Callable[[], None] = lambda: None
        """Called when `num_busy` has changed."""
        self.limit: Literal["max_turns", "timeout_s"] | None = None
        """The limit that a request was refused for: it ends the episode."""
        self.is_closed = False
        self.fault: PolicyFault | None = None
        """What kept the newest request from being answered, where that was infrastructure."""

    async def complete(self, request: CompletionRequest) -> Completion:
        """The answer.

        A request whose client has gone away is sampled to its end all the same, and whoever asks the same next is
        given that; so is one that says that it asks again.

        Raises:
            RequestRefused: the episode is over, a limit is reached, or the conversation cannot be answered.
            PolicyFault: no engine answered.
        """
        identity = _Identity.of(request)
        asked = self._same(request, identity) or self._ask(request, identity)
        asked.num_waiting += 1
        try:
            answer = await asyncio.shield(asked.answer)
        finally:
            asked.num_waiting -= 1
        if not asked.is_delivered:
            asked.is_delivered = True
            self._record(answer)
        return answer.completion

    async def generate(
        self, prompt_ids: npt.NDArray[np.int32], *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """What the policy samples behind tokens [T] that the program holds itself.

        They are recorded behind the longest line that they begin with, or else as a line of their own.

        Raises:
            RequestRefused: the episode is over, a limit is reached, or the context is full.
            PolicyFault: no engine answered.
        """
        self._num_open += 1
        self._busy(1)
        line = None
        try:
            self._refuse_what_is_over()
            line = self._line_with(prompt_ids)
            line.is_busy = True
            generation = await self._continue(
                prompt_ids, max_tokens, tuple(stop), routing_from=line.ledger.num_routed
            )
        except BaseException as error:
            self._num_refused += isinstance(error, RequestRefused)
            self.fault = error if isinstance(error, PolicyFault) else self.fault
            raise
        finally:
            self._num_open -= 1
            self._busy(-1)
            if line is not None:
                line.is_busy = False
        self.fault = None
        self._record_tokens(line, prompt_ids, generation)
        return generation

    async def count_tokens(self, request: CompletionRequest) -> int:
        """The tokens that a request's answer would be sampled behind. Raises `RequestRefused`."""
        return len(await self._render(self._prompt(request, tools_key(request.tools))))

    @property
    def last_message(self) -> AssistantMessage | None:
        """The newest answer of the main conversation; None before the first."""
        return self._last_messages.get(self.main_conversation)

    @property
    def main_conversation(self) -> int:
        """The number of the conversation with the most answers; -1 before the first answer.

        Of several it is one with tools, then the longest, since a client that edits what it was answered begins another
        conversation with each request, and then the earliest.
        """
        ranks: dict[int, tuple[int, bool, int]] = {}
        for line in self._lines:
            num_answers, _, length = ranks.get(line.conversation, (0, False, 0))
            length = max(length, len(line.messages))
            ranks[line.conversation] = (num_answers + line.num_answers, bool(line.tools), length)
        return max(ranks, key=lambda number: (ranks[number], -number), default=-1)

    def segments(self) -> tuple[Segment, ...]:
        """The tokens of every line, each sampled token in one of them."""
        return tuple(line.ledger.to_segment() for line in self._lines)

    def transcript(self) -> tuple[Message, ...]:
        """The main conversation as it was gone on with last, and behind it every other line, by its number."""
        main = self.main_conversation
        of_main = [line for line in self._lines if line.conversation == main]
        rest = [line for line in self._lines if line not in of_main[-1:]]
        named = [
            addressed(message, f"line/{self._lines.index(line)}")
            for line in rest
            for message in line.messages
        ]
        return (*(of_main[-1].messages if of_main else ()), *named)

    def has_been_asked(self) -> bool:
        """Whether there was any request, answered or not."""
        return bool(self._num_asked or self._num_refused)

    def counts(self) -> SessionCounts:
        """What happened so far."""
        by_conversation: dict[int, list[Line]] = {}
        for line in self._lines:
            by_conversation.setdefault(line.conversation, []).append(line)
        main = self.main_conversation
        lost = [
            asked.answer.result().generation
            for several in self._asked.values()
            for asked in several
            if not asked.is_delivered and asked.answer.done() and not asked.has_failed
        ]
        return SessionCounts(
            num_answers=self.num_answers,
            num_conversations=len(by_conversation),
            num_side_calls=sum(
                number != main and sum(line.num_answers for line in lines) == 1 and not lines[0].tools
                for number, lines in by_conversation.items()
            ),
            num_branches=len(self._lines) - len(by_conversation),
            num_refused=self._num_refused,
            num_retried=self._num_retried,
            num_lost_tokens=sum(len(generation) for generation in lost),
        )

    async def close(self) -> None:
        """Answer nothing more, and give up what nobody waits for."""
        self.is_closed = True
        open_tasks = [
            asked.answer for several in self._asked.values() for asked in several if not asked.answer.done()
        ]
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)

    def _same(self, request: CompletionRequest, identity: _Identity) -> _Asked | None:
        """What is being sampled, or was, for an equal request that this one is another try of."""
        for asked in reversed(self._asked.get(identity, ())):
            was_left = not asked.is_delivered and not asked.num_waiting
            if not asked.has_failed and (was_left or request.is_retry):
                self._num_retried += 1
                return asked
        return None

    def _ask(self, request: CompletionRequest, identity: _Identity) -> _Asked:
        answer = asyncio.get_running_loop().create_task(self._answer(request, identity.tools))
        answer.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # nobody may be left to hear of it
        asked = _Asked(answer=answer)
        self._asked.setdefault(identity, []).append(asked)
        return asked

    async def _answer(self, request: CompletionRequest, tools: Hashable) -> _Answer:
        self._num_open += 1
        self._busy(1)
        prompt = None
        try:
            self._refuse_what_is_over()
            prompt = self._prompt(request, tools)
            if prompt.extends and prompt.parent is not None:
                # From here on no other request appends to the line, whatever this one waits for.
                prompt.parent.line.is_busy = True
            answer = await self._sample(request, prompt)
        except BaseException as error:
            if prompt is not None and prompt.extends and prompt.parent is not None:
                prompt.parent.line.is_busy = False
            self._num_refused += isinstance(error, RequestRefused)
            self.fault = error if isinstance(error, PolicyFault) else self.fault
            if isinstance(error, NoSlot):
                raise RequestRefused(str(error), status=429, retry_after_s=BUSY_RETRY_S) from error
            raise
        finally:
            self._num_open -= 1
            self._busy(-1)
        self.fault = None
        return answer

    def _busy(self, change: int) -> None:
        self.num_busy += change
        self.on_busy()

    def _refuse_what_is_over(self) -> None:
        if self.is_closed:
            raise RequestRefused("the episode is over", status=410)
        if self._clock.is_over:
            self.limit = self.limit or "timeout_s"
        elif self.num_answers + self._num_open > self._limits.max_turns:
            self.limit = self.limit or "max_turns"
        if self.limit is not None:
            value = self._limits.max_turns if self.limit == "max_turns" else self._limits.timeout_s
            raise RequestRefused(f"the episode is over: {self.limit}={value:g} is reached")

    def _prompt(self, request: CompletionRequest, key: Hashable) -> _Prompt:
        """What a request goes on from."""
        messages, tools = request.messages, request.tools
        if not messages or messages[-1]["role"] == "assistant":
            raise RequestRefused("a conversation must end with a message that an answer can follow")
        count, parent = self._tree.find(key, messages)
        if parent is not None:
            new = messages[count:]
            messages = (*parent.messages, *new)
            history = copy.copy(parent.history)
            if history.continues(messages) and not any(message["role"] == "assistant" for message in new):
                line = parent.line
                extends = not line.is_busy and parent.num_tokens == len(line.ledger)
                return _Prompt(
                    messages=messages,
                    new=new,
                    tools=tools,
                    tools_key=key,
                    history=history,
                    parent=parent,
                    is_behind=True,
                    extends=extends,
                )
        history = self._renderer.history(tools)
        history.continues(messages)
        return _Prompt(
            messages=messages,
            new=messages,
            tools=tools,
            tools_key=key,
            history=history,
            parent=parent,
            is_behind=False,
            extends=False,
        )

    async def _render(self, prompt: _Prompt) -> npt.NDArray[np.int32]:
        """The tokens of the whole prompt."""
        before = Ledger()
        if prompt.is_behind and prompt.parent is not None:
            before.append_observation(prompt.parent.line.ledger.token_ids[: prompt.parent.num_tokens])
        try:
            new = await render_ids(self._renderer, before, prompt.new, prompt.tools, self._clock.slots)
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        return np.concatenate([before.token_ids, new])

    async def _sample(self, request: CompletionRequest, prompt: _Prompt) -> _Answer:
        number = self._num_asked
        self._num_asked += 1
        prompt_ids = await self._render(prompt)
        generation = await self._continue(
            prompt_ids,
            request.max_tokens,
            request.stop,
            routing_from=prompt.parent.line.ledger.num_routed if prompt.extends and prompt.parent else 0,
            number=number,
        )
        message, finish_reason, stop = self._read(request, prompt, generation)
        completion = Completion(
            completion_id=f"{self._id}-{number}",
            message=message,
            finish_reason=finish_reason,
            stop=stop,
            prompt_ids=prompt_ids,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            num_cached_tokens=generation.num_cached_tokens,
        )
        return _Answer(prompt=prompt, generation=generation, completion=completion)

    async def _continue(
        self,
        prompt_ids: npt.NDArray[np.int32],
        max_tokens: int | None,
        stop: tuple[str, ...],
        *,
        routing_from: int,
        number: int | None = None,
    ) -> Generation:
        """Sample behind tokens, as the `number`-th request; None: a new one."""
        limits = self._limits
        if number is None:
            number = self._num_asked
            self._num_asked += 1
        budget = limits.max_tokens_per_episode - len(prompt_ids)
        if budget <= 0:
            raise RequestRefused(
                f"the conversation has {len(prompt_ids)} tokens, which leaves no room for an answer in a context of "
                f"{limits.max_tokens_per_episode} tokens (context_length_exceeded)"
            )
        asked_for = limits.max_tokens_per_turn if max_tokens is None else max(1, max_tokens)
        sampling = replace(
            self._sampling,
            max_tokens=min(limits.max_tokens_per_turn, budget, asked_for),
            stop=stop,
            routing_from=routing_from,
        )
        return await generate_turn(
            self._policy,
            prompt_ids,
            sampling,
            functools.partial(derive_seed, self._seed, number),
            self._clock,
            Interruption(limits.interruption_timeout_s),
        )

    def _read(
        self, request: CompletionRequest, prompt: _Prompt, generation: Generation
    ) -> tuple[AssistantMessage, FinishedBy, str | None]:
        """The message that was sampled, why it is over, and the stop text that ended it."""
        text, stop = cut_at(self._renderer.decode(generation.token_ids), request.stop)
        in_thought = self._renderer.opens_thought(prompt.messages, is_first=False)
        message = self._dialect.parse(text, in_thought=in_thought, tools=request.tools)
        if any(call.error for call in message.tool_calls):
            # No protocol has a form for it: the program sees what the policy wrote.
            thought, content = split_thought(text)
            message = AssistantMessage(content=content, reasoning=thought, raw_text=text)
        message = self._renderer.with_call_ids(message, self._num_calls_before(prompt.messages))
        self._num_calls += len(message.tool_calls)
        if generation.finish_reason == "length":
            return message, "length", stop
        return message, "tool_calls" if message.tool_calls else "stop", stop

    def _num_calls_before(self, messages: tuple[Message, ...]) -> int:
        """The number of the next call: of the session's, or, where the template shows it, of the conversation's.

        Clients take an id that they have seen in another conversation for a call that was answered.
        """
        if self._renderer.form.call_ids == "any":
            return self._num_calls
        return sum(len(each.get("tool_calls") or ()) for each in messages)

    def _record(self, answer: _Answer) -> None:
        """Append a delivered answer to its line."""
        prompt, completion = answer.prompt, answer.completion
        parent = prompt.parent
        if prompt.extends and parent is not None:
            line, num_old = parent.line, parent.num_tokens
            assert line.is_busy and num_old == len(line.ledger), "a line was appended to that was busy"
            line.is_busy = False
        else:
            conversation = len(self._lines) if parent is None else parent.line.conversation
            line, num_old = Line(conversation=conversation, tools=prompt.tools), 0
            self._lines.append(line)
        line.ledger.begin_turn(self.num_answers)
        line.ledger.append_observation(completion.prompt_ids[num_old:])
        line.ledger.append_generation(answer.generation)
        line.num_answers += 1
        self.num_answers += 1
        line.messages = (*prompt.messages, completion.message.to_message())
        self._last_messages[line.conversation] = completion.message
        place = _Place(line=line, num_tokens=len(line.ledger), messages=line.messages, history=prompt.history)
        self._tree.add(prompt.tools_key, line.messages, place)
        self._on_answer(completion.message, prompt.new)

    def _line_with(self, prompt_ids: npt.NDArray[np.int32]) -> Line:
        """The longest line that is a beginning of the tokens; a new one, which is not recorded yet, where none is."""
        fitting = [
            line
            for line in self._lines
            if not line.is_busy and np.array_equal(line.ledger.token_ids, prompt_ids[: len(line.ledger)])
        ]
        return max(fitting, key=lambda line: len(line.ledger), default=None) or Line(
            conversation=len(self._lines)
        )

    def _record_tokens(self, line: Line, prompt_ids: npt.NDArray[np.int32], generation: Generation) -> None:
        """Append what was sampled behind tokens to its line. The transcript has the texts of both."""
        if not any(line is known for known in self._lines):
            line.conversation = len(self._lines)
            self._lines.append(line)
        said = self._renderer.decode(prompt_ids[len(line.ledger) :])
        text = self._renderer.decode(generation.token_ids)
        message = AssistantMessage(content=text, raw_text=text)
        line.ledger.begin_turn(self.num_answers)
        line.ledger.append_observation(prompt_ids[len(line.ledger) :])
        line.ledger.append_generation(generation)
        line.num_answers += 1
        self.num_answers += 1
        heard: Message = {"role": "user", "content": said}
        line.messages = (*line.messages, heard, message.to_message())
        self._last_messages[line.conversation] = message
        self._on_answer(message, (heard,))


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the first of the stop texts in it, and which that is; all of it and None where none is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop
