"""The four edges, faked: policy, tools, chat (the tokenizer) and task, in a tiny token-level world.

A token is a character. An episode is a string of one-word turns: `g` and any other word is a move
that the tool records, `b` is a move that dooms the episode, `=ok` and `=no` are answers, `?` is a
malformed call. A turn carries the number of the completion it was scripted in, so that every leaf
can be distinguished: `g~12;` is a good move of completion 12, and `;` ends the turn.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import BelConfig, GrowthConfig
from elpo_ray.config.rollout import SandboxConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.interfaces import Tools
from elpo_ray.rollout.sample import Sample
from elpo_ray.rollout.settings import RolloutSettings
from elpo_ray.rollout.worker import RolloutWorker
from elpo_ray.tools import code_interpreter
from elpo_ray.tools.interpreter import PooledTools
from elpo_ray.tools.sandbox_host import SandboxHost
from elpo_ray.tree import Node, RolloutTree
from elpo_ray.types import (
    FinishReason,
    InfrastructureError,
    Message,
    Parsed,
    Problem,
    RewardValue,
    Sampling,
    Score,
    Step,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)
from sandbox.supervisor import Sandbox

Word = str | tuple[str, float]
"""A scripted turn, optionally with the entropy of its tokens (0 otherwise), in nats."""
Plan = Callable[[int, list[str]], Sequence[Word]]
"""(number of the completion, words before it) -> the turns it will take."""
ASKED = "ASKED:"
"""Begins a prompt that shows no tools."""
TURN = re.compile(r"([^~|\]]+)~(\d+);")


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def completion_of(step: Step) -> int:
    """The number of the completion in which a step was scripted."""
    match = TURN.fullmatch(decode(step.turn.token_ids))
    assert match is not None
    return int(match[2])


def leaf_of(tree: RolloutTree, completion: int) -> int:
    """The leaf that a completion ended in."""
    return next(
        leaf.id for leaf in tree.leaves() if leaf.step and completion_of(leaf.step) == completion
    )


def subtree(tree: RolloutTree, node_id: int) -> list[Node]:
    """`node_id` and everything below it."""
    below = [tree.nodes[node_id]]
    for node in below:
        below += [tree.nodes[child] for child in node.children]
    return below


class Faults:
    """Raises `kind` where `pattern` says so; sound for ever once it is used up."""

    def __init__(
        self, pattern: Iterable[bool] = (), kind: type[InfrastructureError] = InfrastructureError
    ) -> None:
        self._pattern: Iterator[bool] = iter(pattern)
        self._kind = kind
        self.raised = 0

    def strike(self) -> None:
        if next(self._pattern, False):
            self.raised += 1
            raise self._kind("injected")


class ScriptedPolicy:
    """Plays `plan`. A prefix whose last turn some completion has already gone beyond, or that has
    no turn at all, starts a new completion."""

    def __init__(self, plan: Plan, faults: Faults | None = None, first: int = 0) -> None:
        """`first`: the first completion's number; another's where prefixes of another policy are
        continued."""
        self._plan = plan
        self._first = first
        self.faults = faults or Faults()
        self._left: dict[int, list[Word]] = {}
        self._depth: dict[int, int] = {}
        self.seeds: list[int | None] = []
        self.warm: list[bool] = []
        self.prefixes: list[str] = []
        self.reply = "I do not know."
        """What it says to a question (`Rollout.ask`)."""
        self.questions: list[str] = []

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        self.seeds.append(sampling.seed)
        self.warm.append(sampling.warm)
        text = decode(prefix)
        if text.startswith(ASKED):
            self.faults.strike()
            self.questions.append(text.removeprefix(ASKED))
            ids = encode(self.reply)[: sampling.max_tokens]
            return Turn(tuple(ids), (-0.5,) * len(ids), (0.0,) * len(ids), FinishReason.STOP, 3)
        self.prefixes.append(text)
        depth, last = text.count(";"), text.rfind(";")
        number = int(text[text.rfind("~", 0, last) + 1 : last]) if depth else -1
        if not depth or self._depth.get(number) != depth:
            number = self._first + len(self._left)
            self._left[number] = list(self._plan(number, [turn[1] for turn in TURN.finditer(text)]))
        self._depth[number] = depth + 1
        await asyncio.sleep(0)
        self.faults.strike()
        word = self._left[number].pop(0)
        word, entropy = word if isinstance(word, tuple) else (word, 0.0)
        ids = encode(f"{word}~{number};")
        finish = FinishReason.STOP if len(ids) <= sampling.max_tokens else FinishReason.LENGTH
        ids = ids[: sampling.max_tokens]
        return Turn(tuple(ids), (-0.5,) * len(ids), (entropy,) * len(ids), finish, weight_version=3)


class FakeChat:
    """`Q:…|` is the prompt, `[…]` an observation."""

    def prompt_ids(self, messages: Sequence[Message], *, tools: bool = True) -> list[int]:
        begin = "Q:" if tools else ASKED
        return encode(begin + "".join(message["content"] for message in messages) + "|")

    def parse(self, token_ids: Sequence[int]) -> Parsed:
        text = decode(token_ids)
        word = text.partition("~")[0]
        if word.startswith("="):
            return Parsed(text)
        if word == "?":
            return Parsed(text, error="a question mark is no call")
        return Parsed(text, call=ToolCall("move", {"move": word}))

    def observation_ids(self, text: str, tool: str | None = None) -> list[int]:
        return encode(f"[{text}]")


class FakeSession:
    """Records moves; its state is all of them."""

    def __init__(self, tools: FakeTools, moves: tuple[str, ...]) -> None:
        self._tools = tools
        self._moves = moves

    @property
    def state(self) -> tuple[str, ...]:
        return self._moves

    async def call(self, call: ToolCall) -> ToolResult:
        await asyncio.sleep(0)
        self._tools.faults.strike()
        self._moves += (call.arguments["move"],)
        return ToolResult(ToolKind.OK, self._tools.reply(self._moves), duration_s=0.25)

    async def reward(self) -> RewardValue:
        return None

    async def close(self) -> None:
        self._tools.live -= 1


class FakeTools:
    """Deterministic sessions; counts those that are open."""

    def __init__(
        self,
        reply: Callable[[tuple[str, ...]], str] = lambda moves: str(len(moves)),
        faults: Faults | None = None,
    ) -> None:
        self.reply = reply
        self.faults = faults or Faults()
        self.live = 0
        self.opened_at: list[tuple[str, ...] | None] = []
        self.trees: set[str] = set()
        """Used and not yet released."""

    async def begin(self, problem: Problem, tree: str, *, alone: bool = False) -> str | None:
        return None

    async def open(
        self,
        *,
        setup: str = "",
        at: tuple[str, ...] | None = None,
        tree: str | None = None,
        branches: bool = True,
    ) -> FakeSession:
        self.faults.strike()
        self.live += 1
        self.opened_at.append(at)
        if tree is not None:
            self.trees.add(tree)
        return FakeSession(self, at or ())

    async def release(self, tree: str) -> None:
        self.trees.discard(tree)


def local_tools(
    sandbox: Sandbox, config: SandboxConfig, *, faults: tuple[type[Exception], ...] = ()
) -> PooledTools:
    """The tools over one real sandbox of this process."""
    return PooledTools([SandboxHost(sandbox)], config, faults=faults)


class FakeTask:
    """Succeeds with `=ok` unless a move was `b`; that move is the planted irrecoverable step."""

    def train_problem(self, index: int) -> Problem:
        return Problem(f"p{index}", ({"role": "user", "content": f"go {index}"},), None)

    def eval_problems(self, count: int) -> list[Problem]:
        return [self.train_problem(-1 - i) for i in range(count)]

    async def score(
        self,
        problem: Problem,
        steps: Sequence[Step],
        tools: Tools,
        environment: RewardValue = None,
    ) -> Score:
        success = steps[-1].action_text.startswith("=ok") and self.recoverable(problem, steps)
        return Score(1.0 if success else -1.1, success)

    def answer(self, problem: Problem, steps: Sequence[Step]) -> str | None:
        word = steps[-1].action_text.partition("~")[0]
        return word.removeprefix("=") if word.startswith("=") else None

    def recoverable(self, problem: Problem, steps: Sequence[Step]) -> bool:
        return not any(step.call and step.call.arguments["move"] == "b" for step in steps)

    def demonstration(self, index: int) -> list[Message] | None:
        return None


def planted(num_tool_steps: int, critical: int, entropy: Callable[[], float] = float) -> Plan:
    """A plan for `num_tool_steps` = K moves and an answer: a trajectory from the prompt goes wrong
    in step `critical` (K+1 = a wrong answer); a completion of a prefix makes no mistake of its
    own, hence succeeds exactly if it starts before that step."""

    def plan(number: int, before: list[str]) -> list[Word]:
        words = ["g"] * num_tool_steps + ["=ok"]
        if not before:
            words[critical - 1] = "b" if critical <= num_tool_steps else "=no"
        return [(word, entropy()) for word in words[len(before) :]]

    return plan


def bel(n_total: int = 16, **settings: Any) -> GrowthConfig:
    return GrowthConfig(n_total=n_total, bel=BelConfig(**settings))


def make_config(growth: GrowthConfig | None = None, *, retries: int = 2, **task: Any) -> Config:
    """Turns enough for every plan here, unless `task` says otherwise."""
    return Config(
        algorithm=AlgorithmConfig(growth=growth or bel()),
        task=TaskConfig(**{"max_turns": 64} | task),
        sandbox=SandboxConfig(retries=retries),
    )


def make_worker(
    plan: Plan,
    config: Config | None = None,
    *,
    policy_faults: Iterable[bool] = (),
    tools: FakeTools | None = None,
    first: int = 0,
) -> RolloutWorker:
    """A worker over the fakes."""
    policy = ScriptedPolicy(plan, Faults(policy_faults), first)
    settings = RolloutSettings.of(config or make_config())
    return RolloutWorker(policy, tools or FakeTools(), FakeChat(), FakeTask(), settings)


def sample_of(problem: str = "p", index: int = 0, **changes: Any) -> Sample:
    """A failed sample of a problem, with these fields."""
    plain = Sample(
        problem=problem, index=index, success=False, reward=-1.0, graded=True, answer="7",
        end="answer", turns=3, tool_calls=2, tokens=30, observation_tokens=9, tool_seconds=0.5,
        tool_kinds={"ok": 1, "error": 1}, weight_version=0, transcript=[],
    )  # fmt: skip
    return replace(plain, **changes)


def tool_call(code: str = "1", id: str = "c1", arguments: str | None = None) -> dict[str, Any]:
    function = {"name": code_interpreter.NAME, "arguments": arguments or json.dumps({"code": code})}
    return {"id": id, "type": "function", "function": function}


def server_says(
    content: str | None, *calls: dict[str, Any], tokens: int = 5, finish: str = "stop"
) -> tuple[int, dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = list(calls)
    return 200, {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens},
    }  # fmt: skip


class Server:
    """An OpenAI-compatible server on the loopback: answers requests from a script and keeps what
    was asked."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.models = ["m"]
        self.delay_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = [{"id": m, "object": "model", "created": 0} for m in server.models]
                self.reply(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                server.asked.append(json.loads(self.rfile.read(length)))
                time.sleep(server.delay_s)
                self.reply(*server.script.pop(0))

            def reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
